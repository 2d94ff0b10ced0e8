"""A server on actors of Ray: answers, faults of an engine, and lost actors."""

import gc
import os
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import actors
import fakes
import numpy as np
import pytest
from actors import Odd, x
from pictures import png

import superserve_jax as ss
from superserve_jax import errors, remote
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.serving import makers
from superserve_jax.simulation.paper_profile import paper_profile

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

WAIT_S = 60.0


def engines_of(devices, **options):
    return makers.make_all(devices, actors.Fake(**options))[0]


@pytest.fixture(scope="module")
def devices():
    found = remote.ray_devices(2, num_cpus=0)
    engines_of(found)
    return found


def serve(devices, **made):
    engines = engines_of(devices, **made)
    return engines, ss.Server.from_engines(engines, [engine.profile for engine in engines], slo_ms=60_000.0)


def values(futures):
    return [f.result(WAIT_S).output[0] for f in futures]


def test_answers_are_those_of_the_engine(devices):
    _, server = serve(devices)
    with server as s:
        assert values(s.submit_many([x(i) for i in range(100)])) == list(range(100))
        assert s.health()["failures"] == 0


def test_a_poisoned_input_fails_alone(devices):
    _, server = serve(devices)
    with server as s:
        futures = s.submit_many([x(i) for i in (1, 2, Odd.POISON, 3)])
        with pytest.raises(errors.InferenceError, match="poison"):
            futures[2].result(WAIT_S)
        assert values(futures[:2] + futures[3:]) == [1, 2, 3]
        assert s.health()["alive"] == 2


def test_image_files_are_decoded_in_the_process_and_a_damaged_one_fails_alone(devices):
    engines, server = serve(devices, shape=(8, 8, 3))
    with server as s:
        array, good = np.full((8, 8, 3), 9, np.uint8), png(3)
        damaged = good[:45] + bytes(len(good) - 45)
        futures = s.submit_many([png(1), array, png(2, size=40), damaged, array, png(4)])
        with pytest.raises(errors.InferenceError, match="cannot be read as an image"):
            futures.pop(3).result(WAIT_S)
        assert values(futures) == [1, 9, 2, 9, 4]
        assert s.health()["alive"] == 2
        with pytest.raises(errors.ConfigError, match="cannot decode image files"):
            s.add_worker(FakeDevice(engines[0].profile, input_shape=(8, 8, 3), input_dtype=np.uint8))


def test_a_batch_that_is_too_large_for_the_memory_becomes_smaller(devices):
    _, server = serve(devices)
    with server as s:
        assert values(s.submit_many([x(Odd.MEMORY) for _ in range(16)])) == [Odd.MEMORY] * 16
        assert min(w["max_batch"] for w in s.health()["per_worker"]) <= 8


def test_outputs_that_do_not_fit_the_inputs_count_as_a_failure(devices):
    _, server = serve(devices)
    with server as s:
        first, second = s.submit_many([x(Odd.NONSENSE)] * 2)
        assert len(first.result(WAIT_S).output) == len(second.result(WAIT_S).output) == 1  # each was right alone
        assert s.health()["failures"] > 0
        assert values(s.submit_many([x(i) for i in range(8)])) == list(range(8))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP, "segfault"])
def test_a_lost_actor_costs_no_query_and_comes_back(devices, kill):
    engines, server = serve(devices)
    with server as s:
        values(s.submit_many([x(i) for i in range(64)]))
        futures = s.submit_many([x(i) for i in range(64)])
        pid = engines[0].pid
        if kill == "segfault":
            futures.append(s.submit(x(Odd.SEGFAULT)))
        else:
            os.kill(pid, kill)
        futures += s.submit_many([x(i) for i in range(64)])
        fakes.wait_until(lambda: s.health()["alive"] == 1 or kill == "segfault")
        if kill == signal.SIGSTOP:
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
        good = futures[:64] + futures[-64:]
        assert values(good) == [*range(64)] * 2
        fakes.wait_until(lambda: s.health()["alive"] == 2)
        assert values(s.submit_many([x(i) for i in range(64)])) == list(range(64))


def test_a_silent_process_is_lost_soon_also_after_a_long_time_at_full_load(devices):
    engines, server = serve(devices, speed=20.0)  # each batch is done long before its profiled p99
    with server as s:
        values(s.submit_many([x(i % 200) for i in range(6_400)]))
        os.kill(engines[0].pid, signal.SIGSTOP)
        futures = s.submit_many([x(i) for i in range(64)])
        start_s = time.monotonic()
        fakes.wait_until(lambda: s.health()["alive"] == 1)
        took_s = time.monotonic() - start_s
        os.kill(engines[0].pid, signal.SIGCONT)
        assert values(futures) == list(range(64))
    assert took_s < 2.0  # 200 batches have been 200 * 7 ms early or more; the patience for one is 0.2 s


def test_a_device_that_is_ten_times_slower_than_its_profile_is_not_lost(devices):
    engines = engines_of(devices, speed=0.1)
    profiles = [engine.profile for engine in engines]
    with ss.Server.from_engines(engines, profiles, slo_ms=60_000.0, policy="fixed:largest") as s:
        assert values(s.submit_many([x(i) for i in range(64)])) == list(range(64))
        assert "lost" not in [w["state"] for w in s.health()["per_worker"]]


def test_a_process_that_falls_silent_while_it_opens_an_export_is_given_up():
    device = remote.ray_device(num_cpus=0)
    [engine] = engines_of([device])
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            opening = thread.submit(engines_of, [device], speed=2.0)
            time.sleep(0.2)
            with pytest.raises(errors.EngineLostError, match="has not answered in time"):
                engine.run(engine.profile.fastest().subnet, 1, [x(1)])
            with pytest.raises(errors.EngineLostError, match="was lost while it opened an export"):
                opening.result(WAIT_S)
    finally:
        os.kill(engine.pid, signal.SIGCONT)


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_process_may_open_an_export_for_long_if_it_answers_pings(devices, monkeypatch, is_silent):
    for name, seconds in (("_SILENT_S", 2), ("_BEGIN_S", 3), ("_WARN_S", 1)):
        monkeypatch.setattr(f"superserve_jax.remote.devices.{name}", seconds)
    [engine] = engines_of(devices[:1])
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(engines_of, devices[:1], speed=4.0 + is_silent, open_s=5.0)
        time.sleep(2.0)  # the first ping is answered
        if not is_silent:
            [opened] = opening.result(WAIT_S)
            assert [one[0] for one in opened.run(opened.profile.fastest().subnet, 1, [x(1)])] == [1]
            return
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(errors.EngineLostError, match="was lost while it opened an export"):
                opening.result(WAIT_S)
        finally:
            os.kill(engine.pid, signal.SIGCONT)


def test_two_servers_share_the_engine_of_a_process(devices):
    [_, first], [_, second] = serve(devices, speed=3.0), serve(devices, speed=3.0)
    with first as s:
        with second as other:
            assert values(other.submit_many([x(i) for i in range(32)])) == list(range(32))
        del second, other
        gc.collect()
        time.sleep(0.2)  # for the calls that drop the engines
        assert values(s.submit_many([x(i) for i in range(32)])) == list(range(32))
        assert s.health()["failures"] == 0


def test_an_engine_is_freed_without_the_garbage_collector(devices):
    """Otherwise the actor would hold the old export for long after a swap."""
    [engine, _] = engines_of(devices)
    gone = weakref.ref(engine)
    gc.disable()
    try:
        engine.run(engine.profile.fastest().subnet, 1, [x(1)])
        del engine, _
        assert gone() is None
    finally:
        gc.enable()


def test_a_device_whose_process_was_ended_starts_a_new_one():
    import ray

    device = remote.ray_device(num_cpus=0)
    [first] = engines_of([device])
    ray.kill(device.actor)
    [second] = engines_of([device])
    assert first.pid != second.pid


def test_all_engines_get_the_batch_sizes_of_the_first():
    """Each process chooses its own, if nobody says which."""
    made, profile = [], paper_profile()
    smaller = profile.at(profile.batch_sizes[:2])

    class Chooses:
        def __init__(self, own):
            self.own = own

        def make_engine(self, source):
            made.append(source)
            return None, self.own if isinstance(source, Any) else source

    class Any:
        def at(self, first):
            return first

    anything = Any()
    _, profiles = makers.make_all([Chooses(profile), Chooses(smaller), Chooses(profile)], anything)
    assert profiles == [profile] * 3
    assert made == [anything] * 3 + [profile]


def test_a_host_whose_clock_is_wrong_by_an_hour():
    device = remote.ray_device(num_cpus=0)
    [engine] = engines_of([device], clock_off_s=3600.0)
    with ss.Server.from_engines([engine], engine.profile, slo_ms=60_000.0) as s:
        assert values(s.submit_many([x(i) for i in range(32)])) == list(range(32))
        assert s.health()["alive"] == 1
