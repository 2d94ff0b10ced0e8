"""Time limits of gRPC calls, their number, and their lines in the access log."""

import json
import threading
import time

import fakes
import gateways
import grpcs
import numpy as np
from grpc import StatusCode
from grpcs import Client, message, opened, refused, values

from superserve_jax.gateway.grpc import codec, service

ROW = np.uint8([[[7, 2], [3, 4]]])
INFER, STREAM = (f"/{service.NAME}/{name}" for name in ("ModelInfer", "ModelStreamInfer"))


def endless(stop):
    yield message(ROW)
    stop.wait(fakes.WAIT_S)


def test_a_stream_without_a_request_ends_after_a_time():
    with opened(limits={"idle_s": 0.2}) as (_, door), Client(door) as client:
        stop = threading.Event()
        stream = client.stream(endless(stop))
        assert values(next(stream).infer_response).tolist() == [[7, 2]]
        code, text = refused(next, stream)
        stop.set()
        assert code is StatusCode.DEADLINE_EXCEEDED
        assert "no message came within 0.2 s" in text


def test_a_stream_that_waits_for_an_answer_is_not_idle():
    valve = gateways.Valve()
    with opened(gateways.engine(valve), limits={"idle_s": 0.1}) as (server, door), Client(door) as client:
        stop = threading.Event()
        with valve.shut(server, ROW[0]):
            stream = client.stream(endless(stop))
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            time.sleep(0.4)
        assert values(next(stream).infer_response).tolist() == [[7, 2]]
        assert refused(next, stream)[0] is StatusCode.DEADLINE_EXCEEDED
        stop.set()


def test_calls_wait_while_the_event_loop_is_busy(monkeypatch):
    count, busy_s, read = 3000, 1.0, codec.read

    def slow_once(*arguments):
        monkeypatch.setattr(codec, "read", read)
        time.sleep(busy_s)
        return read(*arguments)

    with opened() as (_, door), Client(door) as client:
        method, _ = client.method("ModelInfer")
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]
        monkeypatch.setattr(codec, "read", slow_once)
        waiting = [method.future(message(ROW), timeout=fakes.WAIT_S) for _ in range(count)]
        assert {call.code() for call in waiting} == {StatusCode.OK}


def test_a_message_that_does_not_come_to_an_end_is_not_waited_for(caplog):
    with opened(limits={"body_s": 0.2}) as (_, door), Client(door) as client:
        with grpcs.http2(door) as sock:
            sock.sendall(grpcs.headers(INFER.encode()) + grpcs.data(message(ROW).SerializeToString(), ends=False)[:-3])
            assert grpcs.status(sock) == StatusCode.DEADLINE_EXCEEDED.value[0]
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]
    assert not caplog.records


def test_the_access_log_has_a_line_for_each_call(tmp_path):
    file = tmp_path / "access.jsonl"
    options = {"access_log": str(file), "token": "a-secret-of-many-letters", "grpc_port": 0}
    with gateways.opened(gateway_options=options) as (_, door), Client(door) as client:
        token = [("authorization", "Bearer a-secret-of-many-letters")]
        traced = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
        made = message(ROW)
        client.infer(made, metadata=token + traced)
        assert len([*client.stream(iter([made, made]), metadata=token)]) == 2
        refused(client.infer, message(ROW, name="other"), metadata=token)
        refused(client.infer, made)
        refused(client.channel.unary_unary("/a/b"), b"", timeout=fakes.WAIT_S)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    size = len(made.SerializeToString())
    assert [(line["path"], line["status"], line["grpc"]) for line in lines] == [
        (INFER, 200, "OK"),
        (STREAM, 200, "OK"),
        (INFER, 404, "NOT_FOUND"),
        (INFER, 401, "UNAUTHENTICATED"),
        ("", 501, "UNIMPLEMENTED"),
    ]
    assert [line["received"] for line in lines[:2]] == [size, 2 * size]
    assert lines[0]["sent"] > 80
    assert lines[1]["sent"] > 2 * 80
    assert lines[0]["trace"] == "0af7651916cd43dd8448eb211c80319c"
    assert {line["method"] for line in lines} == {"gRPC"}
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    assert all(0 <= line["ms"] < 1e4 and abs(line["time"] - time.time()) < 60 for line in lines)


def test_a_call_that_its_client_cancels_has_a_line(tmp_path):
    file, valve = tmp_path / "access.jsonl", gateways.Valve()
    options = {"access_log": str(file), "grpc_port": 0}
    with (
        gateways.opened(gateways.engine(valve), gateway_options=options) as (server, door),
        Client(door) as client,
        valve.shut(server, ROW[0]),
    ):
        call = client.start(message(ROW))
        fakes.wait_until(lambda: server.health()["waiting"] == 1)
        call.cancel()
        fakes.wait_until(lambda: all(query.cancelled() for query in server.pool.backlog.queue.items()))
    [line] = map(json.loads, file.read_text().splitlines())
    assert (line["status"], line["grpc"]) == (499, "CANCELLED")
