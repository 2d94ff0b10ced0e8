"""Calls over gRPC that fail in the gateway, that take long, and that are open when the gateway closes."""

import itertools
import threading

import fakes
import gateways
import grpcs
import numpy as np
import pytest
from grpc import RpcError, StatusCode
from grpcs import Client, Request, message, opened, refused, values

from superserve_jax.gateway import documents
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import calls, codec, service
from superserve_jax.gateway.model import ServedModel

ROW = np.uint8([[[7, 2], [3, 4]]])


def broken(*_, **__):
    raise KeyError("secret")


def named(id, rows=ROW):
    made = message(rows)
    made.id = id
    return made


@pytest.mark.parametrize("name", ["ServerMetadata", "ModelInfer"])
def test_an_unexpected_error_leaves_its_place(monkeypatch, caplog, name):
    for kind in calls.MOST_OPEN:
        monkeypatch.setitem(calls.MOST_OPEN, kind, 2)
    with opened() as (_, door), Client(door) as client:
        monkeypatch.setattr(documents, "server_metadata", broken)
        monkeypatch.setattr(ServedModel, "submit", broken)
        ask = (lambda: client.infer(message(ROW))) if name == "ModelInfer" else lambda: client.call(name)
        for _ in range(5):
            code, text = refused(ask)
            assert (code, text) == (StatusCode.INTERNAL, "the gateway failed; its log has the reason")
        assert client.call("ServerReady").ready
    assert "secret" in caplog.text
    assert "secret" not in text


@pytest.mark.parametrize(("sign", "count"), [("e", 1400), ("%", 1400), ("\u20ac", 666), ("\U0001f600", 500)], ids=range(4))
def test_a_long_error_reaches_the_client(monkeypatch, sign, count):
    """Signs other than ASCII are longer on their way: clients refuse metadata of more than 8 KiB."""

    def refuse(**_):
        raise RequestError(1400 * sign)

    with opened() as (_, door), Client(door) as client:
        monkeypatch.setattr(documents, "server_metadata", refuse)
        assert refused(client.call, "ServerMetadata") == (StatusCode.INVALID_ARGUMENT, count * sign)


def test_an_unexpected_error_of_a_stream_is_in_its_place(monkeypatch, caplog):
    real = ServedModel.submit

    def submit(self, request, slo_ms):
        return broken() if request.id == "1" else real(self, request, slo_ms)

    with opened() as (_, door), Client(door) as client:
        monkeypatch.setattr(ServedModel, "submit", submit)
        found = [*client.stream(named(str(i)) for i in range(3))]
    assert [(each.infer_response.id, each.error_message) for each in found] == [
        ("0", ""),
        ("1", "the gateway failed; its log has the reason"),
        ("2", ""),
    ]
    assert "secret" in caplog.text


def test_a_stream_whose_reader_fails_ends_with_an_error(monkeypatch, caplog):
    with opened() as (_, door), Client(door) as client:
        monkeypatch.setattr(service.Service, "_drop", broken)
        assert refused(lambda: [*client.stream(iter([Request()]))])[0] is StatusCode.INTERNAL
    assert "secret" in caplog.text


def test_a_failed_check_of_the_time_limits_does_not_end_them(monkeypatch, caplog):
    real, failed = calls.Call.expire, []

    def expire(self):
        if not failed:
            failed.append(self)
            broken()
        real(self)

    monkeypatch.setattr(calls.Call, "expire", expire)
    with opened(limits={"body_s": 0.1}) as (_, door), Client(door) as client:
        stop = threading.Event()
        method = client.channel.stream_unary(f"/{service.NAME}/ModelInfer")
        assert refused(method, iter(stop.wait, None), timeout=fakes.WAIT_S)[0] is StatusCode.DEADLINE_EXCEEDED
        stop.set()
    assert "secret" in caplog.text


# -- what takes long ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["texts", "message"])
def test_what_takes_long_keeps_no_other_client_waiting_and_keeps_its_place(monkeypatch, what):
    hold, read_fields, read = threading.Event(), ServedModel.read_fields, codec.read
    long = what == "message"

    def held(*_):
        assert hold.wait(fakes.WAIT_S)
        return np.full((1, 32, 32), 7, np.uint8)

    def with_texts(self, fields, data):
        request = read_fields(self, fields, data)
        return request._replace(rows=[["x" * 3000]]) if request.id == "long" and not long else request

    def slow(model, made):
        if made.id == "long" and long:
            held()
        return read(model, made)

    monkeypatch.setattr(ServedModel, "read_fields", with_texts)
    monkeypatch.setattr(ServedModel, "encoded", held)
    monkeypatch.setattr(codec, "read", slow)
    rows = np.full((300 if long else 1, 32, 32), 7, np.uint8)
    with opened(gateways.engine(input_shape=(32, 32))) as (_, door), Client(door) as client:
        stream = client.stream(iter([named("long", rows), named("short", rows[:1])]))
        call = client.start(named("long", rows))
        for _ in range(5):
            assert values(client.infer(named("", rows[:1]))).tolist() == [[7, 2]]
        assert not call.done()
        hold.set()
        assert len(values(call.result(fakes.WAIT_S))) == len(rows)
        found = [response.infer_response for response in stream]
    assert [each.id for each in found] == ["long", "short"]
    assert [len(values(each)) for each in found] == [len(rows), 1]


def held_read():
    """An event, and a `codec.read` that waits for it."""
    hold, real = threading.Event(), codec.read

    def held(model, made):
        assert hold.wait(fakes.WAIT_S)
        return real(model, made)

    return hold, held


def test_a_request_that_is_still_read_when_its_client_goes_is_not_submitted(monkeypatch):
    hold, held = held_read()
    rows = np.full((300, 32, 32), 7, np.uint8)
    with opened(gateways.engine(input_shape=(32, 32))) as (server, door), Client(door) as client:
        before = server.snapshot()["queries"]["arrived"]
        monkeypatch.setattr(codec, "read", held)
        for call in (client.start(message(rows)), client.stream(iter([message(rows)]))):
            threading.Event().wait(0.1)
            call.cancel()
        fakes.wait_until(lambda: client.call("ServerReady").ready)
        hold.set()
        assert values(client.infer(message(rows[:1]))).tolist() == [[7, 2]]
        assert server.snapshot()["queries"]["arrived"] == before + 1


# -- closing ------------------------------------------------------------------------------------------------------------------


def test_closing_answers_requests_that_are_still_read(monkeypatch):
    hold, held = held_read()
    rows = np.full((300, 32, 32), 7, np.uint8)
    with opened(gateways.engine(input_shape=(32, 32))) as (_, door), Client(door) as client:
        monkeypatch.setattr(codec, "read", held)
        call = client.start(message(rows))
        threading.Event().wait(0.1)
        thread = threading.Thread(target=door.close)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        hold.set()
        assert len(values(call.result(fakes.WAIT_S))) == 300
        thread.join(fakes.WAIT_S)


def test_busy_streams_end_when_the_gateway_closes(caplog):
    """Each request that was taken has an answer, and no query is left."""
    with opened() as (server, door), Client(door) as client:
        found = [[] for _ in range(4)]

        def run(answers):
            try:
                for response in client.stream(named(str(i)) for i in itertools.count()):
                    answers.append(response)
            except RpcError as error:
                answers.append(error.code())

        threads = [threading.Thread(target=run, args=(answers,)) for answers in found]
        for thread in threads:
            thread.start()
        fakes.wait_until(lambda: all(len(answers) > 20 for answers in found))
        door.close()
        for thread in threads:
            thread.join(fakes.WAIT_S)
        for *answers, end in found:
            assert end is StatusCode.UNAVAILABLE
            assert [answer.infer_response.id for answer in answers if not answer.error_message] == [
                str(i) for i in range(sum(not answer.error_message for answer in answers))
            ]
        fakes.wait_until(lambda: server.health()["waiting"] == 0)
    assert not [record for record in caplog.records if record.name.startswith("superserve_jax")]


def test_a_call_whose_client_goes_before_its_message_leaves_its_place(monkeypatch, caplog):
    monkeypatch.setitem(calls.MOST_OPEN, "inference", 2)
    with opened() as (_, door), Client(door) as client:
        for _ in range(5):
            with grpcs.http2(door) as sock:
                sock.sendall(grpcs.headers(f"/{service.NAME}/ModelInfer".encode()))
                sock.sendall(grpcs.headers(f"/{service.NAME}/ModelStreamInfer".encode(), 3))

        def is_free():
            try:
                return bool(client.infer(message(ROW)))
            except RpcError:
                return False

        fakes.wait_until(is_free)
    assert not caplog.records
