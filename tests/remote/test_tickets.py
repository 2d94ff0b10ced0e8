"""Routers in this process: calls that do not wait for their slowest query, and servers that cannot serve."""

import asyncio
import functools
import pickle
import threading
import time

import numpy as np
import pytest
from policy_cases import make_profile

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.remote import packing, router
from superserve_jax.remote.calls import Part, RouterLostError
from superserve_jax.remote.host import Failed
from superserve_jax.remote.router import Router
from superserve_jax.serving.server import Server

TABLE = make_profile([(1.0,)], [0.7], (1,))


class Held(FakeEngine):
    """An engine that computes 9 only when it may."""

    def __init__(self):
        super().__init__(TABLE, speed=float("inf"))
        self.go = threading.Event()

    def run(self, subnet, batch_size, inputs):
        if any(x == 9 for x in inputs):
            self.go.wait(10)
        return super().run(subnet, batch_size, inputs)


@pytest.fixture
def held():
    engine = Held()
    with Server.from_engines([engine], TABLE, policy="fixed:smallest", slo_ms=100.0) as server:
        yield engine, server
        engine.go.set()


def part(*values, slo_ms=100.0, waited_ms=0.0):
    return Part(packing.pack([np.float32(v) for v in values]), slo_ms, waited_ms)


def fates(answers):
    return [each and each.output[0] for each in answers.unpacked()]


def test_a_call_returns_what_is_done_and_the_rest_comes_when_it_is_done(held):
    engine, server = held

    async def ask():
        asked = Router(lambda: server)
        await asked.infer([part(5)])
        begin_s = time.monotonic()
        first = await asked.infer([part(1, slo_ms=200), part(9, slo_ms=300)])
        assert time.monotonic() - begin_s >= 0.2
        assert fates(first) == [1, None]
        later = asyncio.create_task(asked.rest(first.ticket))
        await asyncio.sleep(0.05)
        assert not later.done()
        engine.go.set()
        last = await later
        assert (fates(last), last.ticket) == ([9], "")
        assert not asked._rests  # noqa: SLF001 - nothing else shows a leak
        again = await asked.rest(first.ticket)
        with pytest.raises(RouterLostError, match=f"ticket {first.ticket} is not known"):
            raise pickle.loads(again.error)

    asyncio.run(ask())


def test_a_ticket_that_nobody_uses_is_forgotten_and_its_queries_are_cancelled(held, monkeypatch):
    engine, server = held
    monkeypatch.setattr(router, "_FORGET_S", 0.02)

    async def ask():
        asked = Router(lambda: server)
        running = await asked.infer([part(9, slo_ms=1)])
        waiting = await asked.infer([part(2, slo_ms=1)])
        assert running.ticket != waiting.ticket
        await asyncio.sleep(0.1)
        assert not asked._rests  # noqa: SLF001 - nothing else shows a leak
        engine.go.set()

    asyncio.run(ask())
    server.close()
    assert server.snapshot()["queries"]["cancelled"] >= 1


def test_a_late_query_keeps_its_slo():
    with Server.from_engines([FakeEngine(TABLE, speed=float("inf"))], TABLE, slo_ms=100.0) as server:
        [reply] = asyncio.run(Router(lambda: server).infer([part(1, slo_ms=50, waited_ms=60)])).unpacked()
        assert not reply.met_slo
        assert reply.latency_ms >= 60
        assert server.pool.backlog.meter.slo_ms == pytest.approx(50)


def test_a_server_without_workers_is_no_good_router(held):
    _, server = held

    async def ask():
        asked = Router(lambda: server)
        assert (await asked.about()).subnets
        server.close()
        return await asked.about()

    found = asyncio.run(ask())
    assert isinstance(found, Failed)
    assert isinstance(pickle.loads(found.error), errors.WorkersLostError)


def test_a_description_has_no_addresses():
    assert router.description(functools.partial(part, 3)) == "functools.partial(<function part>, 3)"
    assert router.description(functools.partial(part, 3)) != router.description(functools.partial(part, 4))
