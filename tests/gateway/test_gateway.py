"""A gateway opens its port, and closes without losing a request."""

import asyncio
import contextlib
import os
import signal
import socket
import threading

import fakes
import gateways
import numpy as np
import pytest
from fakes import WAIT_S
from gateways import INFER, answers, connect, infer, is_closed, opened, request

from superserve_jax import errors, gateway
from superserve_jax.gateway import documents
from superserve_jax.gateway.connections import Connection
from superserve_jax.gateway.grpc.port import Port

ROW = np.uint8([[[7, 2], [3, 4]]])
CONTENT = gateways.body(ROW)
HEAD = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(CONTENT))


def test_closing_answers_the_requests_that_have_arrived():
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door):
        with valve.shut(server, ROW[0]), connect(door) as busy, connect(door) as idle:
            busy.sendall(HEAD + CONTENT)
            idle.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answers(idle)[0].status == 200
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            closing = threading.Thread(target=door.close)
            closing.start()
            assert is_closed(idle)
            with pytest.raises(ConnectionRefusedError):
                connect(door)
            assert closing.is_alive()
            valve.open()
            [answer] = answers(busy)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            closing.join()
        door.close()
        assert server.submit(ROW[0]).result(WAIT_S).met_slo


def test_a_request_that_takes_too_long_gets_503_when_the_gateway_closes(caplog):
    valve = gateways.Valve()
    with opened(gateways.engine(valve), limits={"drain_s": 0.05}) as (server, door):
        with valve.shut(server, ROW[0]), connect(door) as sock, connect(door) as half:
            sock.sendall(HEAD + CONTENT)
            half.sendall(HEAD)
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            door.close()
            [answer] = answers(sock)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answers(half)[0].status == 503
        fakes.wait_until(lambda: server.snapshot()["queries"]["cancelled"] == 1)


def test_an_idle_connection_may_still_send_a_request_when_the_gateway_closes():
    with opened() as (_, door), connect(door) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answers(sock)
        closing = threading.Thread(target=door.close)
        closing.start()
        fakes.wait_until(lambda: ready_of(sock) == 503)
        assert is_closed(sock)
        closing.join()


def test_new_connections_are_served_for_the_first_seconds_of_closing():
    with opened(limits={"lame_duck_s": 0.5}) as (_, door):
        closing = threading.Thread(target=door.close)
        closing.start()
        fakes.wait_until(lambda: request(door, "GET", "/v2/health/ready").status == 503)
        answer = infer(door, CONTENT)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        closing.join()
        with pytest.raises(ConnectionRefusedError):
            connect(door)


def test_connections_that_the_system_has_accepted_are_answered_when_the_gateway_closes(monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def block(**_):
        entered.set()
        assert leave.wait(WAIT_S)
        return {}

    monkeypatch.setattr(documents, "server_metadata", block)
    with opened() as (_, door), contextlib.ExitStack() as stack:
        blocking = stack.enter_context(connect(door))
        blocking.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert entered.wait(WAIT_S)  # the event loop is busy
        clients = [stack.enter_context(connect(door)) for _ in range(20)]
        for sock in clients:
            sock.sendall(HEAD + CONTENT)
        closing = threading.Thread(target=door.close)
        closing.start()
        leave.set()
        assert [answers(sock)[0].status for sock in (blocking, *clients)] == [200] * 21
        closing.join()


def ready_of(sock):
    sock.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return answers(sock)[0].status


def test_an_error_in_one_connection_keeps_the_time_limits_of_the_others(monkeypatch, caplog):
    checking, failed = Connection.check, []

    def check(connection, now_s):
        if not failed:
            failed.append(connection)
            raise KeyError("broken")
        checking(connection, now_s)

    with opened(limits={"idle_s": 0.2}) as (_, door), connect(door) as first:
        monkeypatch.setattr(Connection, "check", check)
        assert is_closed(first)
        with connect(door) as second:
            assert is_closed(second)
    assert failed
    assert "time limits of a connection cannot be checked" in caplog.text


def test_a_server_may_be_closed_before_its_gateway():
    with opened() as (server, door):
        server.close()
        assert infer(door, CONTENT).status == 503
        assert request(door, "GET", "/v2/health/live").status == 200


def test_waiting_for_a_gateway_may_have_a_limit():
    with opened() as (_, door):
        assert not door.wait(0.01)
        door.close()
        assert door.wait(0.01)
        assert door.wait()


def test_a_closed_port_is_free_again():
    with opened() as (server, door):
        port = int(door.url.rsplit(":", 1)[1])
        door.close()
        with gateway.Gateway(server, port=port) as again:
            assert again.url == door.url
            assert infer(again, CONTENT).status == 200
            with pytest.raises(errors.ConfigError, match="choose another port"):
                gateway.Gateway(server, port=port)


def test_a_gateway_has_several_servers_by_name():
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(fakes.serve(gateways.engine())) for name in ("one", "other")}
        door = stack.enter_context(gateway.Gateway(servers, port=0))
        assert repr(door) == f"<Gateway at {door.url}: one, other>"
        for name in servers:
            assert infer(door, CONTENT, f"/v2/models/{name}/infer").json["model_name"] == name
        servers["one"].close()
        assert request(door, "GET", "/v2/health/ready").status == 503
        assert request(door, "GET", "/v2/models/other/ready").status == 200
        assert infer(door, CONTENT, "/v2/models/other/infer").status == 200
        assert infer(door, CONTENT, "/v2/models/one/infer").status == 503


def test_a_server_that_does_not_answer_is_refused():
    with (
        fakes.serve(gateways.engine(fakes.fail)) as server,
        pytest.raises(errors.ConfigError, match="does not answer a blank"),
    ):
        gateway.Gateway(server, port=0)


def test_a_gateway_may_listen_on_ipv6():
    with fakes.serve(gateways.engine()) as server, gateway.Gateway(server, host="::1", port=0) as door:
        assert door.url.startswith("http://[::1]:")
        assert infer(door, CONTENT).status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "choose another port"),
        ({"port": "http"}, "choose another port"),
        ({"host": "no.such.host.invalid"}, "cannot listen at host 'no.such.host.invalid'"),
        ({"name": "a/b"}, "'a/b' cannot be the name of a model"),
        ({"name": "stats"}, "'stats' cannot be"),
        ({"host": ""}, "host is empty"),
        ({"limits": 5}, "limits must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with fakes.serve(gateways.engine()) as server, pytest.raises(errors.ConfigError, match=message):
        gateway.Gateway(server, **{"port": 0, **options})


def test_wrong_servers_are_refused():
    with fakes.serve(gateways.engine()) as server:
        for wrong in (None, "digits", {}, {"a": 5}, {5: server}):
            with pytest.raises(errors.ConfigError):
                gateway.Gateway(wrong, port=0)
        with pytest.raises(errors.ConfigError, match="one server and its name"):
            gateway.Gateway({"a": server}, port=0, name="b")
    with fakes.serve(gateways.engine(input_dtype=np.complex64)) as odd, pytest.raises(errors.ConfigError, match="complex64"):
        gateway.Gateway(odd, port=0)


def test_an_error_leaves_no_thread_and_no_open_port():
    with fakes.serve(gateways.engine()) as server:
        with pytest.raises(KeyError), gateway.Gateway(server, port=0) as door:
            raise KeyError
        with pytest.raises(ConnectionRefusedError):
            connect(door)
    assert_no_thread_is_left()


def assert_no_thread_is_left():
    names = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    assert not [name for name in names if name.startswith(("superserve-gateway", "superserve-access-log"))]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_a_signal_while_the_ports_open_leaves_no_thread(monkeypatch, free_port):
    opening = Port.open

    async def interrupted(port, *address):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)
        await opening(port, *address)

    monkeypatch.setattr(Port, "open", interrupted)
    with fakes.serve(gateways.engine()) as server:
        with pytest.raises(KeyboardInterrupt):
            gateway.Gateway(server, port=free_port, grpc_port=0)
        assert_no_thread_is_left()
        with gateway.Gateway(server, port=free_port) as door:
            assert infer(door, CONTENT).status == 200


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_while_the_thread_starts_leaves_no_thread(monkeypatch, free_port, tmp_path, when):
    starting = threading.Thread.start

    def interrupted(thread):
        if when == "after" or thread.name != "superserve-gateway":
            starting(thread)
        if thread.name == "superserve-gateway":
            raise KeyboardInterrupt

    with fakes.serve(gateways.engine()) as server:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gateway.Gateway(server, port=free_port, grpc_port=0, access_log=str(tmp_path / "log"))
        monkeypatch.undo()
        assert_no_thread_is_left()
        with gateway.Gateway(server, port=free_port) as door:
            assert infer(door, CONTENT).status == 200
