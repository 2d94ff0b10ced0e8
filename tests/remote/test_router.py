"""Routers that are actors of Ray."""

import asyncio
import contextlib
import os
import signal
import threading

import numpy as np
import pytest
from actors import SHAPE, FakeServer, Odd, x

from superserve_jax import errors, remote
from superserve_jax.remote.calls import Part
from superserve_jax.remote.packing import pack

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

WAIT_S = 60.0


def run(work):
    async def limited():
        return await asyncio.wait_for(work, WAIT_S)

    return asyncio.run(limited())


@pytest.fixture(scope="module")
def router():
    yield remote.start_router(FakeServer(speed=0.2), name="lasting")
    remote.stop_router("lasting")


BROKEN = {"error": errors.ExportError("no such export")}


async def pid_of(router):
    """The process of a router."""
    return await router.actor.__ray_call__.remote(lambda _: os.getpid())


def test_calls_at_the_same_time_share_batches(router):
    async def ask():
        collectors = [remote.Collector([router], wait_ms=0, slo_ms=30_000.0) for _ in range(32)]
        return await asyncio.gather(*(collector.submit(x(i)) for i, collector in enumerate(collectors)))

    replies = run(ask())
    assert [reply.output[0] for reply in replies] == list(range(32))
    assert max(reply.batch for reply in replies) > 1
    assert all(reply.met_slo for reply in replies)


def test_errors_stay_with_their_queries(router):
    async def ask():
        collector = remote.Collector([router], wait_ms=20, slo_ms=30_000.0)
        wrong = (collector.submit(x(Odd.POISON)), collector.submit(x(1)[:-1]), collector.submit(x(2), min_accuracy=0.99))
        return await asyncio.gather(*map(collector.submit, map(x, range(4))), *wrong, return_exceptions=True)

    *good, poisoned, short, floor = run(ask())
    assert [reply.output[0] for reply in good] == [0, 1, 2, 3]
    assert isinstance(poisoned, errors.InferenceError)
    assert "poison" in str(poisoned)
    assert isinstance(short, errors.InputError)
    assert isinstance(floor, errors.AccuracyFloorError)


def test_queries_that_cannot_be_pickled_are_wrong_inputs(router):
    with pytest.raises(errors.InputError, match="the queries cannot be sent to lasting"):
        run(router.infer([Part(pack([np.array([threading.Lock()])]), 36.0)]))


def test_about_a_router(router):
    about = run(router.about())
    assert about.input_shape == SHAPE
    assert about.input_dtype == "|u1"
    assert len(about.subnets) > 1


def test_a_killed_router_fails_its_clients_and_comes_back(router):
    other = remote.start_router(FakeServer(), name="killed")
    same = remote.start_router(FakeServer(**BROKEN), name="killed")  # there is one with this name, so nothing is opened

    async def ask():
        collector = remote.Collector([other, router], wait_ms=0, slo_ms=30_000.0, pause_s=0.1)
        await asyncio.gather(other.about(), same.about())
        os.kill(await pid_of(other), signal.SIGKILL)
        fates = [await asyncio.gather(collector.submit(x(i)), return_exceptions=True) for i in range(100)]
        failed = [fate for [fate] in fates if isinstance(fate, Exception)]
        assert all(isinstance(error, remote.RouterLostError) for error in failed)
        assert len(failed) == 1, failed  # the others went to the other router
        assert "killed is lost; send" in str(failed[0])
        while collector.lost():
            await asyncio.sleep(0.05)
        return await other.about(), await collector.submit(x(7))

    about, reply = run(ask())
    assert about.input_shape == SHAPE
    assert reply.output[0] == 7
    remote.stop_router("killed")
    remote.stop_router("unknown")
    with pytest.raises(remote.RouterLostError):
        run(other.about())
    again = remote.start_router(FakeServer(), name="killed")
    with contextlib.suppress(remote.RouterLostError):  # it learns that its actor has died
        run(other.about())
    assert run(other.about()) == run(again.about())
    remote.stop_router("killed")


def test_a_router_and_a_device_may_have_the_same_name():
    import ray

    started = [remote.start_router(FakeServer(), name="shared-0"), remote.start_router(FakeServer(), name="shared-1")]
    devices = remote.ray_devices(2, name="shared", num_cpus=0)
    try:
        pids = ray.get([device.actor.ping.remote() for device in devices], timeout=WAIT_S)
        assert run(started[0].about()).input_shape == SHAPE
        remote.stop_router("shared-0")
        assert ray.get([device.actor.ping.remote() for device in devices], timeout=WAIT_S) == pids
    finally:
        for device in devices:
            ray.kill(device.actor)
        for name in ("shared-0", "shared-1"):
            remote.stop_router(name)


def test_what_keeps_a_server_from_opening_is_raised(router):
    started = remote.start_router(FakeServer(**BROKEN))
    with pytest.raises(errors.ExportError, match="no such export"):
        run(remote.Collector([started]).submit(x(1)))
