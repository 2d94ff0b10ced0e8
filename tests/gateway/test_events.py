"""Streams of events: they begin with what is kept, end with the gateway, and a slow reader is dropped."""

import asyncio
import contextlib
import http.client
import json
import socket

import fakes
import gateways
import pytest
from fakes import WAIT_S
from gateways import opened, request

from superserve_jax import errors, gateway
from superserve_jax.gateway.events import Events
from superserve_jax.gateway.failures import RequestError


class Numbers:
    """A sampler of numbers."""

    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1
        return b"%d" % self.count

    def history(self):
        return b"to %d" % self.count


def run(main):
    """Runs main(events) in a loop, with a sample every millisecond."""

    async def limited():
        events = Events(Numbers(), most=2, every_s=1e-3)
        events.start()
        async with asyncio.timeout(WAIT_S):
            await main(events)

    asyncio.run(limited())


async def first(stream, count):
    return [(await anext(stream)).decode() for _ in range(count)]


def test_a_stream_begins_with_what_is_kept():
    async def main(events):
        async with contextlib.aclosing(events.answer().stream) as stream:
            assert await first(stream, 3) == ["data: to 1\n\n", "data: 2\n\n", "data: 3\n\n"]
            assert events.open == 1
        assert events.open == 0

    run(main)


def test_a_slow_reader_is_dropped_and_the_others_go_on():
    async def main(events):
        slow, quick = events.answer().stream, events.answer().stream
        await first(slow, 1)
        await first(quick, 1)
        while events.open == 2:
            await first(quick, 1)
        assert [event async for event in slow] == []
        await first(quick, 3)
        await quick.aclose()

    run(main)


def test_the_number_of_streams_is_limited():
    async def main(events):
        streams = [events.answer().stream for _ in range(2)]
        for stream in streams:
            await first(stream, 1)
        with pytest.raises(RequestError, match="2 pages are open already"):
            events.answer()
        await streams[0].aclose()
        assert events.answer().status == 200

    run(main)


def test_a_closing_gateway_takes_no_new_stream():
    async def main(events):
        stream = events.answer().stream
        events.closed = True
        with pytest.raises(errors.ServerClosedError, match="shutting down"):
            events.answer()
        await first(stream, 3)  # its connection ends it
        await stream.aclose()

    run(main)


# -- over the network ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(door):
    """An open stream: its response."""
    with contextlib.closing(http.client.HTTPConnection(door.url.removeprefix("http://"), timeout=WAIT_S)) as connection:
        connection.request("GET", "/events")
        yield connection.getresponse()


def event(response):
    line = response.readline()
    assert line.startswith(b"data: ")
    assert response.readline() == b"\n"
    return json.loads(line.removeprefix(b"data: "))


def test_pages_get_the_same_samples_and_closing_ends_them():
    with opened() as (_, door), listening(door) as one, listening(door) as other:
        assert (one.status, one.getheader("content-type")) == (200, "text/event-stream")
        assert event(one)["about"] == event(other)["about"]
        assert event(one) == event(other)
        door.close()
        assert one.read() == other.read() == b""


def test_a_page_that_nobody_reads_does_not_hold_the_gateway_up():
    """The first event is longer than what the system buffers, and its end does not arrive."""
    engines = [gateways.engine(name=f"{i:010000}") for i in range(20)]
    with fakes.serve(*engines) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        models, limits = {f"model{i}": server for i in range(40)}, gateway.Limits(drain_s=600)
        with gateway.Gateway(models, port=0, limits=limits) as door:
            sock.connect(("127.0.0.1", int(door.url.rsplit(":", 1)[1])))
            sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(4)
        left = b""
        with contextlib.suppress(ConnectionResetError):
            while got := sock.recv(1 << 20):
                left += got
        assert not left.endswith(b"\r\n0\r\n\r\n")


def test_other_methods_are_refused():
    with opened() as (_, door):
        answer = request(door, "POST", "/events")
        assert (answer.status, answer.headers["allow"]) == (405, "GET")
        door.close()
