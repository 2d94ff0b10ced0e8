"""Workers that take their next batch while the device computes: the same guarantees with two batches under way.

One file because the tests share an engine that computes on its own.
"""

import math
import threading
import time

import fakes
import pytest
from fakes import PROFILE, SUBNETS, WAIT_S, Gate, x

from superserve_jax import errors
from superserve_jax.engines.base import Launched
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.flight import OverlapPace


def device(on_run=None, *, name="fake:0", speed=math.inf, kind=FakeDevice):
    return kind(PROFILE, speed=speed, on_run=on_run, name=name)


def serve(*engines, **options):
    return fakes.serve(*(engines or [device()]), **options)


def values(futures):
    return [future.result(timeout=WAIT_S).output[0] for future in futures]


class Held:
    """A server whose only worker waits for the outputs of its first batch, with 12 queries in three batches."""

    def __init__(self, **options):
        self.gate = Gate()
        self.server = serve(device(self.gate), **options)
        self.futures = self.server.submit_many([x(i) for i in range(12)])
        assert self.gate.entered.wait(WAIT_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.opened.set()
        self.server.close()


@pytest.mark.parametrize(("overlap", "running"), [(None, 8), (True, 8), (False, 4)])
def test_the_next_batch_is_under_way_before_the_first_is_answered(overlap, running):
    with Held(overlap=overlap) as held:
        health = held.server.health()
        assert (health["running"], health["waiting"]) == (running, 12 - running)
        assert not any(future.done() for future in held.futures)
        held.gate.opened.set()
        assert values(held.futures) == list(range(12))
    assert held.gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    counts = held.server.snapshot()
    assert counts["queries"]["met"] == 12
    assert (counts["running"], counts["batch_sizes"]["4"]) == (0, 3)


def test_an_engine_without_launch_runs_one_batch_at_a_time():
    with serve(fakes.fake(), overlap=True) as s:
        assert values(s.submit_many([x(i) for i in range(9)])) == list(range(9))


def test_option_overlap_must_be_true_false_or_none():
    with pytest.raises(errors.ConfigError, match="overlap must be True, False or None"):
        serve(overlap="yes")


def test_the_next_batch_is_taken_late_and_decided_for_the_time_at_which_it_will_begin():
    asked = []

    def noting(profile, state):
        asked.append((time.monotonic(), state.slack_ms))
        return Decision(SUBNETS[0], 4)

    with serve(device(speed=0.04), policy=noting, slo_ms=1000.0) as s:  # 100 ms a batch
        s.pool.members.workers[0].overlap_pace.ratio = 25.0  # as it would have learned
        values(s.submit_many([x(i) for i in range(8)]))
    (first_s, first_ms), (then_s, then_ms) = asked
    assert then_s - first_s > 0.089  # nine tenths of the first
    assert then_ms == pytest.approx(first_ms - 100.0, abs=5.0) or then_s - first_s > 0.1


def test_the_pace_soon_follows_a_fast_device_and_ignores_an_outlier():
    slow = []

    def on_run(*_):
        if slow:
            time.sleep(slow.pop())

    with serve(device(on_run)) as s:
        values(s.submit_many([x(i) for i in range(200)]))
        [worker] = s.pool.members.workers
        assert worker.overlap_pace.ratio < 0.3
        worker.overlap_pace.ratio = 0.5
        slow.append(0.5)  # over a hundred times what the profile says
        values(s.submit_many([x(i) for i in range(4)]))
        assert worker.overlap_pace.ratio < 0.53


@pytest.mark.parametrize("took", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("overslept", [0.0, 0.15])
def test_the_pace_soon_follows_a_device_that_has_become_faster(took, overslept):
    pace, paces = OverlapPace(), []
    pace.ratio = 2.5
    for _ in range(100):
        woke = pace.wake_s(0.0, 1.0) + overslept
        pace.observe_device(took if woke < took else None)
        paces.append(pace.ratio)
    assert paces[11] < 1.12 * took
    assert min(paces) > 0.6 * (took - overslept)
    assert max(paces[50:]) < 1.12 * took


def test_time_for_reading_outputs_does_not_count_as_device_time():
    now_s = [0.0]

    def passes(ms):
        now_s[0] += 1e-3 * ms

    class Reading(FakeDevice):
        def launch(self, subnet, batch_size, inputs):
            wait, outputs = super().launch(subnet, batch_size, inputs)
            return Launched(wait, lambda: passes(2) or outputs())

    with serve(device(lambda *_: passes(1), kind=Reading), clock=lambda: now_s[0]) as s:
        for i in range(20):
            assert values(s.submit_many([x(i)])) == [i]
        assert s.pool.members.workers[0].overlap_pace.ratio == pytest.approx(1.0)


def test_a_process_that_stood_still_changes_no_measurement():
    with Held(slo_ms=60_000.0) as held:
        s = held.server
        [worker] = s.pool.members.workers
        s.pool.abandon_stuck(excused_s=1e3)
        assert worker.alive
        held.gate.opened.set()
        replies = [future.result(WAIT_S) for future in held.futures]
        assert min(min(reply.compute_ms, reply.queue_ms) for reply in replies) >= 0
        assert max(reply.latency_ms for reply in replies) < 1e6
        assert worker.overlap_pace.ratio > 0


def test_the_compute_time_of_a_batch_begins_when_the_device_is_done_with_the_batch_before():
    now_s = [0.0]
    with Held(clock=lambda: now_s[0], stall_s=100.0) as held:
        now_s[0] = 5.0
        held.gate.opened.set()
        assert [future.result(WAIT_S).compute_ms for future in held.futures[::4]] == [5000.0, 0.0, 0.0]


def test_done_callbacks_do_not_count_as_a_batch_that_hangs():
    now_s = [0.0]

    def slowly(_):
        now_s[0] += 0.9
        s.pool.abandon_stuck()

    with Held(clock=lambda: now_s[0], stall_s=1.0) as held:
        s = held.server
        for future in held.futures[3::4]:
            future.add_done_callback(slowly)
        held.gate.opened.set()
        assert values(held.futures) == list(range(12))
        assert s.health()["abandoned"] == 0


def test_both_batches_of_a_worker_that_hangs_are_answered_elsewhere():
    hanging, woken = threading.Event(), threading.Event()

    def hang(*_):
        hanging.set()
        woken.wait(WAIT_S)

    with serve(device(hang), stall_s=0.2) as s:
        futures = s.submit_many([x(i) for i in range(12)])
        assert hanging.wait(WAIT_S)
        s.add_worker(device(name="fake:1"))
        assert values(futures) == list(range(12))
        woken.set()
        counts, health = s.snapshot(), s.health()
    assert [w["state"] for w in health["per_worker"]] == ["abandoned", "idle"]
    assert counts["queries"]["requeued"] == 8
    assert (counts["queries"]["met"], counts["running"]) == (12, 0)


def test_when_the_only_worker_hangs_nobody_waits_for_ever():
    woken = threading.Event()
    with serve(device(lambda *_: woken.wait(WAIT_S)), stall_s=0.2) as s:
        futures = s.submit_many([x(i) for i in range(12)])
        failed = [future.exception(timeout=WAIT_S) for future in futures]
        woken.set()
    assert {type(error) for error in failed} == {errors.WorkersLostError}


def test_a_worker_that_is_removed_answers_both_batches():
    with Held() as held:
        held.server.add_worker(device(name="fake:1"))
        assert values(held.futures[8:]) == [8, 9, 10, 11]
        remover = threading.Thread(target=held.server.remove_worker, args=("fake:0",))
        remover.start()
        held.gate.opened.set()
        assert values(held.futures) == list(range(12))
        remover.join(WAIT_S)
        assert not remover.is_alive()
        assert held.server.snapshot()["queries"]["requeued"] == 0


def test_a_close_without_draining_answers_both_running_batches():
    with Held() as held:
        closer = threading.Thread(target=held.server.close, kwargs={"drain": False})
        closer.start()
        assert isinstance(held.futures[8].exception(timeout=WAIT_S), errors.ServerClosedError)
        held.gate.opened.set()
        assert values(held.futures[:8]) == list(range(8))
        closer.join(WAIT_S)
        assert not closer.is_alive()


class Launching(FakeDevice):
    """A device whose `launch` fails if the batch contains a 5."""

    def launch(self, subnet, batch_size, inputs):
        if any(i == 5 for i in inputs):
            raise RuntimeError("it will not fly")
        return super().launch(subnet, batch_size, inputs)


class Landing(FakeDevice):
    """A device whose outputs fail if the batch contains a 5."""

    def launch(self, subnet, batch_size, inputs):
        launched, poisoned = super().launch(subnet, batch_size, inputs), any(i == 5 for i in inputs)

        def failing():
            found = launched.outputs()
            if poisoned:
                raise RuntimeError("it fell down")
            return found

        return launched._replace(outputs=failing)


@pytest.mark.parametrize("kind", [Launching, Landing])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_poisoned_input_fails_alone_wherever_it_fails(kind, workers):
    with serve(*(device(name=f"fake:{i}", kind=kind) for i in range(workers))) as s:
        futures = s.submit_many([x(i) for i in range(40)])
        failed = {i for i, future in enumerate(futures) if future.exception(timeout=WAIT_S)}
        assert failed == {5}
        assert [future.result().output[0] for i, future in enumerate(futures) if i != 5] == [i for i in range(40) if i != 5]
        assert s.health()["alive"] == workers


def test_a_batch_launched_behind_a_failed_one_is_still_answered():
    def broken_once(*_):
        if not failures:
            failures.append(1)
            raise RuntimeError("once")

    failures = []
    with serve(device(broken_once)) as s:
        assert values(s.submit_many([x(i) for i in range(12)])) == list(range(12))
        assert s.snapshot()["queries"]["requeued"] == 4


def test_a_worker_that_leaves_loses_neither_batch():
    with serve(device(fakes.fail), device(name="fake:1"), max_failures=1) as s:
        assert values(s.submit_many([x(i) for i in range(100)])) == list(range(100))


def test_a_batch_launched_behind_one_that_ends_its_worker_does_not_count_as_failed():
    gate = Gate()

    def burn(*batch):
        gate(*batch)
        fakes.fail()

    with serve(device(burn), max_failures=1, slo_ms=1.0) as s:
        futures = s.submit_many([x(i) for i in range(8)])
        assert gate.entered.wait(WAIT_S)
        s.add_worker(device(name="fake:1"))
        time.sleep(2e-3)  # now all of them are late
        gate.opened.set()
        failed = [future.exception(WAIT_S) is not None for future in futures]
    assert failed == [True] * 4 + [False] * 4


def test_a_worker_with_a_broken_device_pauses_even_if_batches_wait():
    under_way = []

    def burn(*batch):
        if any(i > 0 for i in batch[2]):  # not of blank inputs
            under_way.append(len(s.pool.members.workers[1].flights))
        fakes.fail()

    gate = Gate()
    with serve(device(gate, name="good")) as s:
        futures = s.submit_many([x(i) for i in range(1, 60)])
        assert gate.entered.wait(WAIT_S)
        s.pool.pause_s = 1e-3
        s.add_worker(device(burn, name="bad"))
        while s.health()["alive"] == 2:
            time.sleep(1e-3)
        gate.opened.set()
        assert values(futures) == list(range(1, 60))
    assert under_way == [2, 1, 1, 1, 1]


class Small(FakeDevice):
    """A device whose memory suffices for one batch at a time."""

    under_way = 0

    def launch(self, subnet, batch_size, inputs):
        launched = super().launch(subnet, batch_size, inputs)
        self.under_way += 1

        def or_not():
            crowded, self.under_way = self.under_way > 1, self.under_way - 1
            found = launched.outputs()
            if crowded:
                raise MemoryError
            return found

        return launched._replace(outputs=or_not)


class Narrow(FakeDevice):
    """A device whose memory suffices for no batch of 4."""

    def launch(self, subnet, batch_size, inputs):
        if batch_size == 4:
            raise MemoryError
        return super().launch(subnet, batch_size, inputs)


def test_a_device_with_memory_for_one_batch_at_a_time_gets_one_at_a_time():
    with serve(device(kind=Small)) as s:
        assert values(s.submit_many([x(i) for i in range(40)])) == list(range(40))
        [worker] = s.pool.members.workers
        assert (worker.overlaps, worker.profile.max_batch) == (False, 4)


def test_one_batch_that_runs_out_of_memory_makes_batches_smaller_but_keeps_the_overlap():
    with serve(device(kind=Narrow)) as s:
        assert values(s.submit_many([x(i) for i in range(40)])) == list(range(40))
        [worker] = s.pool.members.workers
        assert (worker.overlaps, worker.profile.max_batch) == (True, 2)


def test_only_queries_that_are_late_now_expire():
    with serve(expire=True) as s:
        pace = s.pool.members.workers[0].overlap_pace
        pace.ratio, pace.host_s = 1e6, 1e9  # the worker expects that the device will be busy for an hour, and does not sleep
        assert values(s.submit_many([x(i) for i in range(12)])) == list(range(12))


def test_blank_inputs_do_not_count_as_running_queries():
    gate = Gate()

    def fail_once(subnet, batch_size, inputs):
        if any(i > 0 for i in inputs) and not gate.entered.is_set():
            fakes.fail()
        gate(subnet, batch_size, inputs)

    with serve(device(fail_once)) as s:
        futures = s.submit_many([x(1), x(2)])
        assert gate.entered.wait(WAIT_S)
        counts = s.snapshot()
        gate.opened.set()
        assert values(futures) == [1, 2]
    assert (counts["running"], counts["waiting"], counts["queries"]["cancelled"]) == (0, 2, 0)


def test_after_a_swap_both_running_batches_end_on_the_old_engine():
    with Held() as held:
        s, new = held.server, fakes.fake(name="new")
        members = s.pool.swappable()
        old = s.pool.swap(members, [new], [PROFILE])
        held.gate.opened.set()
        assert values(held.futures) == list(range(12))
        s.pool.wait_for_swap()
        assert held.gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the third ran on the new one
        assert [worker.overlaps for worker in s.pool.members.workers] == [False]
        assert old[0] is not new
