"""Workers that take their next batch while the device computes: the same guarantees with two batches under way.

One file because the tests share an engine that computes on its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import time

import fakes
import pytest
from fakes import SUBNETS, WAIT_S, Cramped, Faulty, Gate, outcomes, wait_until, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.flight import OverlapPace

device = functools.partial(fakes.fake, make=FakeDevice)


class Hooked(FakeDevice):
    """A device with hooks that are called when a batch is launched, and when its outputs are read. They may raise."""

    def __init__(self, *args, on_launch=lambda *_: None, on_outputs=lambda *_: None, **options):
        super().__init__(*args, **options)
        self.on_launch, self.on_outputs = on_launch, on_outputs

    def launch(self, *batch):
        self.on_launch(*batch)
        launched = super().launch(*batch)

        def outputs():
            found = launched.outputs()
            self.on_outputs(*batch)
            return found

        return launched._replace(outputs=outputs)


def serve(*engines, **options):
    return fakes.serve(*(engines or [device()]), **options)


@contextlib.contextmanager
def held(**options):
    """A server whose only worker waits for the outputs of its first batch, with 12 queries in three batches."""
    gate = Gate()
    with serve(device(gate), **options) as s:
        futures = s.submit_many(x(range(12)))
        with gate.holding():
            yield s, gate, futures


@pytest.mark.parametrize(("overlap", "running"), [(None, 8), (True, 8), (False, 4)])
def test_the_next_batch_is_under_way_before_the_first_is_answered(overlap, running):
    with held(overlap=overlap) as (s, gate, futures):
        assert (s.health()["running"], s.health()["waiting"]) == (running, 12 - running)
        assert not any(future.done() for future in futures)
        gate.opened.set()
        assert outcomes(futures) == list(range(12))
    assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    counts = s.snapshot()
    assert (counts["queries"]["met"], counts["running"], counts["batch_sizes"]["4"]) == (12, 0, 3)


def test_an_engine_without_launch_runs_one_batch_at_a_time():
    with serve(fakes.fake(), overlap=True) as s:
        assert outcomes(s.submit_many(x(range(9)))) == list(range(9))


def test_the_next_batch_is_taken_late_and_decided_for_the_time_at_which_it_will_begin():
    asked = []

    def noting(profile, state):
        asked.append((time.monotonic(), state.slack_ms))
        return Decision(SUBNETS[0], 4)

    with serve(device(speed=0.04), policy=noting, slo_ms=1000.0) as s:  # 100 ms a batch
        s.pool.members.workers[0].overlap_pace.device_s[1e-3 * 4.0] = 0.1  # as it would have learned
        outcomes(s.submit_many(x(range(8))))
    (first_s, first_ms), (then_s, then_ms) = asked
    assert then_s - first_s > 0.089  # nine tenths of the first
    assert then_ms == pytest.approx(first_ms - 100.0, abs=15.0) or then_s - first_s > 0.1


def test_the_pace_soon_follows_a_fast_device_and_ignores_an_outlier():
    slow = []

    def on_run(*_):
        if slow:
            time.sleep(slow.pop())

    with serve(device(on_run)) as s:
        outcomes(s.submit_many(x(range(200))))
        [worker] = s.pool.members.workers
        pace = worker.overlap_pace.device_s
        assert pace[1e-3 * 4.0] < 0.3 * 4e-3
        pace[1e-3 * 4.0] = 0.5 * 4e-3
        slow.append(0.5)  # over a hundred times what the profile says
        outcomes(s.submit_many(x(range(4))))
        assert pace[1e-3 * 4.0] < 0.53 * 4e-3


@pytest.mark.parametrize("took", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("overslept", [0.0, 0.15])
def test_the_pace_soon_follows_a_device_that_has_become_faster(took, overslept):
    pace, paces = OverlapPace(), []
    pace.device_s[1.0] = 2.5
    for _ in range(100):
        woke = pace.wake_s(0.0, 1.0) + overslept
        pace.observe_device(1.0, took if woke < took else None)
        paces.append(pace.device_s[1.0])
    assert paces[11] < 1.12 * took
    assert min(paces) > 0.6 * (took - overslept)
    assert max(paces[50:]) < 1.12 * took


@pytest.mark.parametrize("wrong", [(0, 1, 2), (1,)], ids=["every row", "one row"])
def test_a_profile_that_is_far_too_pessimistic_delays_no_answer(wrong):
    rows = [
        dataclasses.replace(row, latency_ms=(2e4, 3e4, 4e4), p99_ms=()) if i in wrong else row
        for i, row in enumerate(fakes.PROFILE.rows)
    ]
    decided = itertools.count()
    profile = Profile((1, 2, 4), tuple(rows))
    with serve(device(speed=1.0), profile=profile, policy=lambda *_: Decision(SUBNETS[next(decided) % 2], 4)) as s:
        alone = [s.submit(x(i)).result(WAIT_S).latency_ms for i in range(6)]
        crowded = [future.result(WAIT_S).latency_ms for future in s.submit_many(x(range(40)))]
    assert max(alone) < 1e4  # the device takes 1 to 8 ms
    assert max(crowded) < 1e4


def test_time_for_reading_outputs_does_not_count_as_device_time():
    now_s = [0.0]

    def passes(ms):
        now_s[0] += 1e-3 * ms

    with serve(device(lambda *_: passes(1), make=Hooked, on_outputs=lambda *_: passes(2)), clock=lambda: now_s[0]) as s:
        for i in range(20):
            assert outcomes([s.submit(x(i))]) == [i]
        assert [*s.pool.members.workers[0].overlap_pace.device_s.values()] == [pytest.approx(1e-3)]


def test_a_process_that_stood_still_changes_no_measurement():
    with held() as (s, gate, futures):
        [worker] = s.pool.members.workers
        s.pool.abandon_stuck(excused_s=1e3)
        assert worker.alive
        gate.opened.set()
        replies = [future.result(WAIT_S) for future in futures]
        assert min(min(reply.compute_ms, reply.queue_ms) for reply in replies) >= 0
        assert max(reply.latency_ms for reply in replies) < 1e6
        assert min(worker.overlap_pace.device_s.values()) > 0


def test_the_compute_time_of_a_batch_begins_when_the_device_is_done_with_the_batch_before():
    now_s = [0.0]
    with held(clock=lambda: now_s[0], stall_s=100.0) as (_, gate, futures):
        now_s[0] = 5.0
        gate.opened.set()
        assert [future.result(WAIT_S).compute_ms for future in futures[::4]] == [5000.0, 0.0, 0.0]


def test_done_callbacks_do_not_count_as_a_batch_that_hangs():
    now_s = [0.0]

    def slowly(_):
        now_s[0] += 0.9
        s.pool.abandon_stuck()

    with held(clock=lambda: now_s[0], stall_s=1.0) as (s, gate, futures):
        for future in futures[3::4]:
            future.add_done_callback(slowly)
        gate.opened.set()
        assert outcomes(futures) == list(range(12))
        assert s.health()["abandoned"] == 0


@pytest.mark.parametrize("hook", ["on_launch", "on_outputs"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_poisoned_input_fails_alone_wherever_it_fails(hook, workers):
    with serve(*fakes.several(workers, make=Hooked, **{hook: Faulty(5)})) as s:
        answers = outcomes(s.submit_many(x(range(40))))
        assert isinstance(answers.pop(5), errors.InferenceError)
        assert answers == [i for i in range(40) if i != 5]
        assert s.health()["alive"] == workers


def test_a_batch_launched_behind_a_failed_one_is_still_answered():
    def broken_once(*_):
        if not failures:
            failures.append(1)
            raise RuntimeError("once")

    failures = []
    with serve(device(broken_once)) as s:
        assert outcomes(s.submit_many(x(range(12)))) == list(range(12))
        assert s.snapshot()["queries"]["requeued"] == 4


def test_a_worker_that_leaves_loses_neither_batch():
    with serve(device(fakes.fail), device(name="fake:1"), max_failures=1) as s:
        assert outcomes(s.submit_many(x(range(100)))) == list(range(100))


def test_a_batch_launched_behind_one_that_ends_its_worker_does_not_count_as_failed():
    gate = Gate(then=fakes.fail)
    with serve(device(gate), max_failures=1, slo_ms=1.0) as s:
        futures = s.submit_many(x(range(8)))
        assert gate.entered.wait(WAIT_S)
        s.add_worker(device(name="fake:1"))
        time.sleep(2e-3)  # now all of them are late
        gate.opened.set()
        failed = [isinstance(outcome, Exception) for outcome in outcomes(futures)]
    assert failed == [True] * 4 + [False] * 4


def test_a_worker_with_a_broken_device_pauses_even_if_batches_wait():
    under_way = []

    def burn(*batch):
        if any(i > 0 for i in batch[2]):  # not of blank inputs
            under_way.append(len(s.pool.members.workers[1].underway.flights))
        fakes.fail()

    gate = Gate()
    with serve(device(gate, name="good")) as s:
        futures = s.submit_many(x(range(1, 60)))
        assert gate.entered.wait(WAIT_S)
        s.pool.pause_s = 1e-3
        s.add_worker(device(burn, name="bad"))
        wait_until(lambda: s.health()["alive"] == 1)
        gate.opened.set()
        assert outcomes(futures) == list(range(1, 60))
    assert under_way == [2, 1, 1, 1, 1]


def test_a_device_with_memory_for_one_batch_at_a_time_gets_one_at_a_time():
    under_way = []

    def read(*_):
        crowded = len(under_way) > 1
        under_way.pop()
        if crowded:
            raise MemoryError

    with serve(device(make=Hooked, on_launch=lambda *_: under_way.append(1), on_outputs=read)) as s:
        assert outcomes(s.submit_many(x(range(40)))) == list(range(40))
        [worker] = s.pool.members.workers
        assert (worker.overlaps, worker.profile.max_batch) == (False, 4)


def test_one_batch_that_runs_out_of_memory_makes_batches_smaller_but_keeps_the_overlap():
    with serve(device(make=Hooked, on_launch=Cramped(2))) as s:
        assert outcomes(s.submit_many(x(range(40)))) == list(range(40))
        [worker] = s.pool.members.workers
        assert (worker.overlaps, worker.profile.max_batch) == (True, 2)


def test_only_queries_that_are_late_now_expire():
    with serve(expire=True) as s:
        pace = s.pool.members.workers[0].overlap_pace
        pace.device_s, pace.host_s = (
            {1e-3 * 4.0: 1e4},
            1e9,
        )  # the worker expects that the device will be busy for an hour, and does not sleep
        assert outcomes(s.submit_many(x(range(12)))) == list(range(12))


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
        assert outcomes(futures) == [1, 2]
    assert (counts["running"], counts["waiting"], counts["queries"]["cancelled"]) == (0, 2, 0)


def test_after_a_swap_both_running_batches_end_on_the_old_engine_and_the_next_runs_on_the_new_one():
    with held() as (s, gate, futures):
        s.pool.swaps.swap(s.pool.swaps.swappable(), [fakes.fake(name="new")], [fakes.PROFILE])
        gate.opened.set()
        assert outcomes(futures) == list(range(12))
        s.pool.swaps.wait()
        assert gate.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert [worker.overlaps for worker in s.pool.members.workers] == [False]
