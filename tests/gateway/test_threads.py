"""Work in threads: nobody waits for it when the loop or the gateway ends."""

import asyncio
import gzip
import threading
import time

import gateways
import grpcs
import numpy as np
import pytest
from fakes import WAIT_S
from gateways import answers, connect, opened

from superserve_jax.gateway import bodies
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.threads import Threads


class Slow:
    """A function that takes until `end` is set."""

    def __init__(self):
        self.began, self.end, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, *_):
        self.calls += 1
        self.began.set()
        assert self.end.wait(WAIT_S)
        return b""


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.end.set()


def test_results_and_errors_arrive():
    async def work():
        threads = Threads(2)
        assert await asyncio.gather(*(threads.run(pow, 2, i) for i in range(9))) == [2**i for i in range(9)]
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 1, 0)
        return await threads.run(threading.current_thread)

    assert asyncio.run(work()).daemon


def test_a_loop_does_not_wait_for_work_at_its_end(slow):
    async def work():
        return [asyncio.ensure_future(Threads(1).run(slow)), await asyncio.sleep(0.05)]

    asyncio.run(work())
    assert slow.began.is_set()
    assert not slow.end.is_set()


def test_work_that_nobody_waits_for_any_more_is_not_started(slow):
    async def work():
        threads = Threads(1)
        tasks = [asyncio.ensure_future(threads.run(slow)) for _ in range(5)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        slow.end.set()
        assert await threads.run(pow, 2, 3) == 8  # and the thread is free again

    asyncio.run(work())
    assert slow.calls == 1


def test_a_body_that_takes_long_to_inflate_does_not_keep_the_gateway_open(slow, monkeypatch):
    monkeypatch.setattr(bodies, "read", slow)
    body = gzip.compress(np.random.default_rng(0).bytes(10_000))
    with opened(limits={"drain_s": 0.1}) as (_, door), connect(door) as sock:
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
            % (gateways.INFER.encode(), len(body), body)
        )
        assert slow.began.wait(WAIT_S)
        start_s = time.monotonic()
        door.close()
        assert time.monotonic() - start_s < 2
        assert not door.is_open


@pytest.mark.parametrize("what", ["read", "write"])
def test_long_json_is_read_and_written_in_a_thread(monkeypatch, what):
    """Others are answered at that time, and the connection's next request waits for its turn."""
    real, hold = getattr(ServedModel, what), threading.Event()

    def held(self, *arguments):
        assert hold.wait(WAIT_S)
        return real(self, *arguments)

    monkeypatch.setattr(ServedModel, what, held)
    body = gateways.body(np.full((300, 32, 32), 7, np.uint8))
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with opened(gateways.engine(input_shape=(32, 32))) as (_, door), connect(door) as sock:
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (gateways.INFER.encode(), len(body))
        )
        sock.sendall(body + live)
        for _ in range(3):
            assert gateways.request(door, "GET", "/v2/health/live").status == 200
            time.sleep(0.02)
        hold.set()
        first, second = answers(sock, 2)
        assert (first.json["outputs"][0]["shape"], second.json) == ([300, 2], {"live": True})


def test_both_ports_share_the_thread_for_long_messages(monkeypatch):
    """So two of them never hold Python's lock at once."""
    over_http, over_grpc, hold = threading.Event(), threading.Event(), threading.Event()
    real, real_grpc = ServedModel.read, ServedModel.read_fields

    def read(self, *arguments):
        over_http.set()
        assert hold.wait(WAIT_S)
        return real(self, *arguments)

    def read_fields(self, *arguments):
        over_grpc.set()
        return real_grpc(self, *arguments)

    monkeypatch.setattr(ServedModel, "read", read)
    monkeypatch.setattr(ServedModel, "read_fields", read_fields)
    inputs = np.full((300, 32, 32), 7, np.uint8)
    body = gateways.body(inputs)
    with grpcs.opened(gateways.engine(input_shape=(32, 32))) as (_, door), connect(door) as sock, grpcs.Client(door) as client:
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (gateways.INFER.encode(), len(body), body)
        )
        assert over_http.wait(WAIT_S)
        waiting = client.start(grpcs.message(inputs))
        assert not over_grpc.wait(0.2)
        hold.set()
        assert grpcs.values(waiting.result(WAIT_S)).shape == (300, 2)
        assert [answer.status for answer in answers(sock)] == [200]
