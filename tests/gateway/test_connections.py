"""Connections: pipelines, malformed bytes, clients that go away or do not read, and limits."""

import asyncio
import contextlib
import threading
import time

import fakes
import gateways
import numpy as np
import pytest
from gateways import INFER, answers, connect, infer, is_closed, opened

from superserve_jax.gateway import documents, messages
from superserve_jax.gateway.access import Access
from superserve_jax.gateway.connections import Connection, Shared
from superserve_jax.gateway.limits import Limits

ROW = np.uint8([[[7, 2], [3, 4]]])
CONTENT = gateways.body(ROW)
SIZE = len(CONTENT)
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


def head(length=SIZE, *lines):
    """The head of a request for inference, with more header lines."""
    named = b"".join(line + b"\r\n" for line in (b"Host: localhost", *lines))
    size = b"" if length is None else b"Content-Length: %d\r\n" % length
    return b"POST %b HTTP/1.1\r\n%b%b\r\n" % (INFER.encode(), named, size)


def chunked(content, trailer=b""):
    return b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(content), content, trailer)


@pytest.fixture(scope="module")
def door():
    with opened() as (_, door):
        yield door


@contextlib.contextmanager
def waiting(**limits):
    """A server whose worker is busy, with its gateway. Yields the server, the gateway and the valve."""
    valve = gateways.Valve()
    with opened(gateways.engine(valve), limits=limits) as (server, door), valve.shut(server, ROW[0]):
        yield server, door, valve


# -- pipelines and malformed bytes --------------------------------------------------------------------------------------------


def test_malformed_bytes_do_not_overtake_the_answers_before_them():
    with waiting() as (server, door, valve), connect(door) as sock:
        sock.sendall(LIVE + head() + CONTENT + LIVE + b"nonsense\r\n\r\n")
        fakes.wait_until(lambda: server.health()["waiting"] == 1)
        valve.open()
        found = answers(sock, 4)
        assert [answer.status for answer in found] == [200, 200, 200, 400]
        assert found[1].json["outputs"][0]["data"] == [7, 2]
        assert found[3].headers["connection"] == "close"
        assert is_closed(sock)


def test_a_malformed_rest_of_a_refused_body_gets_no_second_answer():
    with opened(limits={"max_body_bytes": 1000}) as (_, door), connect(door) as sock:
        sock.sendall(head(None, b"Transfer-Encoding: chunked") + chunked(bytes(2000))[:-5])
        assert answers(sock)[0].status == 413
        sock.sendall(b"nonsense\r\n\r\n" + LIVE)
        assert is_closed(sock)


def test_pipelined_requests_are_answered_when_the_gateway_closes():
    with waiting() as (server, door, valve), connect(door) as sock:
        sock.sendall(3 * (head() + CONTENT) + LIVE)
        fakes.wait_until(lambda: server.health()["waiting"] == 1)
        closing = threading.Thread(target=door.close)
        closing.start()
        fakes.wait_until(lambda: not reachable(door))
        valve.open()
        found = answers(sock, 4)
        assert [(a.status, a.headers.get("connection")) for a in found] == [*[(200, None)] * 3, (200, "close")]
        closing.join()


def reachable(door):
    try:
        connect(door).close()
    except ConnectionError:
        return False
    return True


def test_a_long_pipeline_is_answered_in_its_order(door):
    with connect(door) as sock:
        bodies = [gateways.body(np.uint8([[[value % 256, 2], [3, 4]]])) for value in range(1000)]
        sending = threading.Thread(target=sock.sendall, args=(b"".join(head(len(b)) + b for b in bodies),))
        sending.start()
        assert [a.json["outputs"][0]["data"][0] for a in answers(sock, 1000)] == [value % 256 for value in range(1000)]
        sending.join()


# -- headers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, 250])
@pytest.mark.parametrize("trailer", [b"X-SLO-Ms: 0.000001\r\n", b"Content-Encoding: br\r\n", b"Content-Encoding: gzip\r\n"])
def test_trailers_have_no_effect(door, trailer, cut):
    content = head(None, b"Transfer-Encoding: chunked") + chunked(CONTENT, trailer)
    with connect(door) as sock:
        for part in (content[:cut], content[cut:] if cut else b""):
            sock.sendall(part)
        [answer] = answers(sock)
    assert (answer.status, answer.json["parameters"]["met_slo"]) == (200, True)


@pytest.mark.parametrize(
    "lines",
    [
        (b"X-SLO-Ms: 20", b"X-SLO-Ms: 30"),
        (b"x-slo-ttft-ms: 20", b"x-slo-ttft-ms: 20"),
        (b"Content-Encoding: gzip", b"content-encoding: identity"),
        (b"Inference-Header-Content-Length: 5", b"Inference-Header-Content-Length: 6"),
        (b"Authorization: Bearer a", b"Authorization: Bearer b"),
        (b"Host: b",),
    ],
)
def test_a_repeated_header_is_refused(door, lines):
    with connect(door) as sock:
        sock.sendall(head(SIZE, *lines) + CONTENT)
        [answer] = answers(sock)
    assert answer.status == 400
    assert "is repeated; send it once" in answer.error


def test_lines_of_a_list_belong_together():
    request = messages.Request()
    for value in (b"br", b"gzip"):
        request.add_header(b"Accept-Encoding", value)
        request.add_header(b"X-Other", value)
    assert request.headers == {b"accept-encoding": b"br, gzip", b"x-other": b"br"}


# -- clients that go away or do not read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelined", [0, 1, 20])
def test_a_query_with_a_large_body_is_cancelled_when_its_client_goes_away(pipelined):
    with waiting() as (server, door, _):
        with connect(door) as sock:
            sock.sendall(head(SIZE + 100_000))
            time.sleep(0.05)  # so that the body comes in later packets
            sock.sendall(CONTENT + b" " * 100_000 + pipelined * LIVE)
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
        fakes.wait_until(lambda: server.pool.backlog.queue.items()[0].cancelled())


@pytest.fixture
def large_answer(monkeypatch):
    """Makes the answer of /v2 larger than the buffers of the system."""
    monkeypatch.setattr(documents, "server_metadata", lambda **_: "x" * 20_000_000)


@pytest.mark.parametrize("then", [b"", head(), head() + CONTENT, b"nonsense\r\n\r\n"])
def test_a_client_that_does_not_read_cannot_keep_the_gateway_open(large_answer, then):
    with opened(limits={"drain_s": 0.1}) as (_, door), connect(door) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n" + then)
        assert sock.recv(1)  # the answer begins
        start_s = time.monotonic()
        door.close()
        assert time.monotonic() - start_s < 2
        assert not door.is_open


class Wire:
    """A transport that keeps what is written to it."""

    def __init__(self):
        self.written, self.closed = [], False

    def write(self, data):
        self.written.append(bytes(data))

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def resume_reading(self):
        pass


def test_an_answer_is_one_packet():
    binary, length = gateways.binary_body(ROW)

    async def serve(app):
        connection, wire = Connection(Shared(app, Limits(), Access(None))), Wire()
        connection.connection_made(wire)
        for content in (head() + CONTENT, head(len(binary), b"Inference-Header-Content-Length: %d" % length) + binary, LIVE):
            connection.data_received(content)
            await until(lambda: len(wire.written))
            [packet] = wire.written
            wire.written.clear()
            assert packet.startswith(b"HTTP/1.1 200 OK\r\n")
        connection.connection_lost(None)

    async def until(condition):
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(1e-3)

    with fakes.serve(gateways.engine()) as s:
        asyncio.run(serve(gateways.app(s)))


# -- memory -------------------------------------------------------------------------------------------------------------------


def test_the_requests_in_memory_have_a_limit():
    with waiting(max_buffered_bytes=300_000, max_body_bytes=250_000) as (_, door, valve):
        with connect(door) as first, connect(door) as second:
            first.sendall(head(240_000) + bytes(200_000))  # the rest does not come
            fakes.wait_until(lambda: status(door, 150_000) == b"503")
            second.sendall(head(None, b"Transfer-Encoding: chunked") + chunked(bytes(240_000)))
            [answer] = answers(second)
            assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
            assert "too many requests in memory" in answer.error
        fakes.wait_until(lambda: status(door, 240_000) == b"100")
        valve.open()
        assert infer(door, CONTENT + b" " * 200_000).status == 200


def test_requests_without_bodies_are_answered_although_the_memory_is_full():
    with opened(limits={"max_buffered_bytes": 19_100, "max_body_bytes": 18_000}) as (_, door), connect(door) as sock:
        sock.sendall(head(18_000) + bytes(17_900))  # the rest does not come
        fakes.wait_until(lambda: status(door, 200) == b"503")
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/supernet", "/metrics"):
            assert gateways.request(door, "GET", path).status == 200


def test_a_slow_body_behind_a_request_without_an_answer_is_refused():
    with waiting(max_buffered_bytes=300_000, max_body_bytes=250_000, body_s=0.2) as (_, door, valve), connect(door) as sock:
        sock.sendall(head() + CONTENT + head(240_000) + bytes(200_000))  # the rest does not come
        fakes.wait_until(lambda: status(door, 150_000) == b"503")
        fakes.wait_until(lambda: status(door, 150_000) == b"100")  # while the first request still waits
        valve.open()
        assert [answer.status for answer in answers(sock, 2)] == [200, 408]


def status(door, length):
    """The status of a request that waits before it sends a body of this length: 100, or the one of an error."""
    with connect(door) as sock:
        sock.sendall(head(length, b"Expect: 100-continue"))
        return sock.recv(1000)[9:12]
