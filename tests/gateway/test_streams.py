"""Answers in parts: they end with their client, and when the gateway closes."""

import asyncio
import threading
import time

import pytest
from fakes import WAIT_S, wait_until
from gateways import INFER, answers, connect, infer, is_closed, opened

from superserve_jax.gateway.app import App
from superserve_jax.gateway.messages import Answer


@pytest.fixture(scope="module")
def door():
    with opened() as (_, door):
        yield door


class Ticks:
    """Answers with a stream of lines. Knows when it was closed."""

    def __init__(self, count=10**9, size=1):
        self.count, self.size, self.closed = count, size, threading.Event()

    async def answer(self, request):
        return Answer(headers=((b"content-type", b"text/event-stream"),), stream=self.lines())

    async def lines(self):
        try:
            for i in range(self.count):
                yield b"%d\n" % i * self.size
                await asyncio.sleep(1e-3)
        finally:
            self.closed.set()


@pytest.fixture
def stream(monkeypatch):
    """A function that makes all answers streams."""

    def start(**options):
        ticks = Ticks(**options)
        monkeypatch.setattr(App, "answer", lambda _, request: ticks.answer(request))
        return ticks

    return start


def test_an_answer_may_be_a_stream(door, stream):
    stream(count=3)
    for version in (b"1.1", b"1.0"):
        with connect(door) as sock:
            sock.sendall(b"GET /events HTTP/%b\r\nHost: localhost\r\n\r\n" % version)
            [answer] = answers(sock)
            assert (answer.content, "content-length" in answer.headers) == (b"0\n1\n2\n", False)


def test_a_stream_is_the_last_answer_of_its_connection(door, stream):
    stream(count=3)
    for behind in (
        b"",
        b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ):
        with connect(door) as sock:
            sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n" + behind)
            [answer] = answers(sock)
            assert (answer.content, answer.headers["connection"]) == (b"0\n1\n2\n", "close")
            assert is_closed(sock)


@pytest.mark.parametrize("at_once", [True, False])
def test_requests_behind_a_stream_take_no_memory(at_once):
    """A client sends most of a body behind its request for events, and reads on for ever."""
    body = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 18000\r\n\r\n" % INFER.encode() + bytes(17_900)
    with opened(limits={"max_buffered_bytes": 19_100, "max_body_bytes": 18_000}) as (_, door), connect(door) as sock:
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n" + at_once * body)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")
        if not at_once:
            sock.sendall(body)
            time.sleep(0.05)
        wait_until(lambda: infer(door, bytes(17_000)).status == 400)


def test_a_stream_ends_when_its_client_goes_away(door, stream):
    ticks = stream()
    with connect(door) as sock:
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(1)
    assert ticks.closed.wait(WAIT_S)


def test_a_stream_ends_when_the_gateway_closes(stream):
    ticks = stream()
    with opened() as (_, door), connect(door) as sock:
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")
        start_s = time.monotonic()
        door.close()
        assert time.monotonic() - start_s < 2
        assert ticks.closed.is_set()
        while sock.recv(65536):  # the end arrives, and not a reset
            pass


def test_a_stream_waits_for_its_client_and_ends_if_that_does_not_read(stream):
    ticks = stream(size=1_000_000)
    with opened(limits={"write_s": 0.2}) as (_, door), connect(door) as sock:
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ticks.closed.wait(WAIT_S)
