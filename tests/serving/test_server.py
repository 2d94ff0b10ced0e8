"""The threaded server on engines without a model: input x answers (x, rank of the subnet)."""

import asyncio
import collections
import contextlib
import gc
import itertools
import math
import random
import sys
import threading
import time

import numpy as np
import pytest
from fakes import LONG_MS, PROFILE, SUBNETS, WAIT_S, Gate, always, by_slack, fail, fake, held, serve, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving import runtime
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    end_s = time.monotonic() + WAIT_S
    while names := [t.name for t in threading.enumerate() if t.name.startswith("superserve")]:
        assert time.monotonic() < end_s, names
        time.sleep(0.001)


# -- answers ------------------------------------------------------------------------------------------------------------------


def test_a_reply_says_what_was_computed_by_which_subnet_and_when():
    with serve(policy=always(1)) as s:
        reply = s.submit(x(5)).result(WAIT_S)
    assert reply.output == (5.0, 1)
    assert (reply.subnet, reply.accuracy, reply.met_slo, reply.batch) == (SUBNETS[1], 0.75, True, 1)
    assert reply.latency_ms == pytest.approx(reply.queue_ms + reply.compute_ms)


def test_queries_submitted_together_are_answered_in_their_order():
    with serve() as s:
        futures = s.submit_many([x(i) for i in range(100)])
        assert [f.result(WAIT_S).output[0] for f in futures] == list(range(100))


def test_a_stacked_array_is_submitted_as_its_rows():
    with serve() as s:
        futures = s.submit_many(np.arange(3, dtype=np.float32))
        assert [f.result(WAIT_S).output[0] for f in futures] == [0, 1, 2]


def test_batches_are_taken_by_deadline_and_no_larger_than_decided():
    with held(policy=always(0, batch=2)) as (s, gate, _):
        futures = [s.submit(x(i), slo_ms=1e3 * ms) for i, ms in ((1, 50), (2, 40), (3, 30), (4, 20), (5, 10))]
        gate.opened.set()
        replies = [f.result(WAIT_S) for f in futures]
    assert gate.batches == [[0], [5, 4], [3, 2], [1]]
    assert [r.batch for r in replies] == [1, 2, 2, 2, 2]


def test_a_decision_larger_than_the_largest_batch_size_is_cut_to_it():
    with held(policy=always(0, batch=99)) as (s, gate, _):
        s.submit_many([x(i) for i in range(6)])
    assert [len(b) for b in gate.batches] == [1, 4, 2]


def test_the_policy_sees_the_state_of_the_queue():
    states = []

    def policy(profile, state):
        states.append(state)
        return Decision(SUBNETS[0], 4)

    now_s = [100.0]
    with held(2, policy=policy, clock=lambda: now_s[0]) as (s, _, first):
        s.submit(x(1)).result(WAIT_S)  # on the other worker
    assert [(t.now_s, t.waiting, t.floors, t.workers) for t in states] == [(100.0, 1, (), 2)] * 2
    assert all(t.slack_ms == pytest.approx(LONG_MS) for t in states)
    assert first.done()


def test_idle_workers_wake_one_another_until_all_work_is_taken():
    together = threading.Barrier(4)
    with serve(*(fake(lambda *_: together.wait(WAIT_S), name=f"fake:{i}") for i in range(4)), policy=always(0, batch=1)) as s:
        assert all(f.result(WAIT_S) for f in s.submit_many([x(i) for i in range(4)]))


def test_a_named_policy_serves():
    with serve(policy="slackfit") as s:
        assert s.submit(x(1)).result(WAIT_S).met_slo


def test_await_works_without_blocking_the_loop():
    async def main():
        with serve() as s:
            replies = await asyncio.gather(*s.submit_many([x(i) for i in range(10)]))
        assert [r.output[0] for r in replies] == list(range(10))

    asyncio.run(main())


# -- accuracy floors ----------------------------------------------------------------------------------------------------------


def test_floors_are_kept_even_by_a_policy_that_ignores_them_and_cost_the_others_nothing():
    with held() as (s, gate, _):
        free, strict, best = (s.submit_many([x(1)] * 5, min_accuracy=floor) for floor in (0.0, 0.75, 0.8))
        gate.opened.set()
        assert {f.result(WAIT_S).accuracy for f in free} == {0.7}
        assert {f.result(WAIT_S).accuracy for f in strict} == {0.75}
        assert {f.result(WAIT_S).accuracy for f in best} == {0.8}


@pytest.mark.parametrize("floor", [0.81, 75, math.nan])
def test_a_floor_that_no_subnet_meets_is_refused(floor):
    with serve() as s, pytest.raises(errors.AccuracyFloorError, match=r"a fraction of 1, but the best served subnet has 0\.8"):
        s.submit(x(1), min_accuracy=floor)


# -- bad arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slo_ms", [0, -1.0, math.nan, math.inf, "fast"])
def test_an_slo_must_be_positive_and_finite(slo_ms):
    message = "slo_ms must be a positive, finite number of milliseconds, got "
    with serve() as s, pytest.raises(errors.DeadlineError, match=message):
        s.submit(x(1), slo_ms=slo_ms)
    with pytest.raises(errors.DeadlineError, match=message):
        serve(slo_ms=slo_ms)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (np.zeros(2, np.float32), r"\(2,\) and dtype float32"),
        (np.array(1, np.uint8), r"\(\) and dtype uint8"),
        (1.0, "float64"),
    ],
    ids=["shape", "dtype", "float"],
)
def test_an_input_is_never_cast(bad, got):
    message = rf"{got}; expected \(\) and float32, one input without a batch dimension.*convert it"
    with serve() as s:
        with pytest.raises(errors.InputError, match=message):
            s.submit(bad)
        with pytest.raises(errors.InputError, match=message):
            s.submit_many([x(1), bad])
        assert s.health()["waiting"] == s.health()["running"] == 0


def test_engines_must_exist_and_agree_on_their_inputs():
    with pytest.raises(errors.ConfigError, match="a server needs engines"):
        Server.from_engines([], PROFILE, policy=always(0))
    with pytest.raises(errors.ConfigError, match="all for the same inputs; 2 engines"):
        serve(fake(), FakeEngine(PROFILE, input_shape=(3,)))


@pytest.mark.parametrize("option", ["max_queue", "max_tries", "max_failures", "stall_s"])
def test_a_limit_must_be_positive(option):
    with pytest.raises(errors.ConfigError, match=f"{option} must be .*got 0"):
        serve(**{option: 0})


def test_a_mistyped_policy_gets_the_nearest_suggested():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'slackfit'"):
        serve(policy="slakfit")


def test_a_full_queue_refuses_at_once_and_takes_all_or_nothing():
    with held(max_queue=3) as (s, _, _):
        s.submit_many([x(1)] * 2)
        message = "2 queries wait and 2 more would exceed max_queue=3; submit more slowly, add devices, or raise max_queue"
        with pytest.raises(errors.QueueFullError, match=message):
            s.submit_many([x(2)] * 2)
        assert s.health()["waiting"] == 2
        s.submit(x(3))
        with pytest.raises(errors.QueueFullError):
            s.submit(x(4))


# -- deadlines ----------------------------------------------------------------------------------------------------------------


def test_a_query_past_its_deadline_is_served_late_and_says_so():
    now_s = [0.0]
    with held(clock=lambda: now_s[0]) as (s, gate, first):
        late = s.submit(x(1), slo_ms=10)
        now_s[0] = 1.0
        gate.opened.set()
        reply = late.result(WAIT_S)
        assert first.result(WAIT_S).met_slo
    assert not reply.met_slo
    assert (reply.queue_ms, reply.latency_ms) == (1000, 1000)


def test_with_expire_a_hopeless_query_is_dropped_uncomputed():
    now_s = [0.0]
    with held(clock=lambda: now_s[0], expire=True) as (s, gate, _):
        # At 1 s the first has 0.5 ms left, less than the 1 ms of the fastest subnet; the second has 2 ms.
        hopeless, feasible = s.submit(x(1), slo_ms=1000.5), s.submit(x(2), slo_ms=1002)
        now_s[0] = 1.0
        gate.opened.set()
        with pytest.raises(errors.DeadlineExpiredError, match="allow a longer slo_ms"):
            hopeless.result(WAIT_S)
        assert feasible.result(WAIT_S).output == (2.0, 0)
    assert gate.batches == [[0], [2]]


# -- cancelling and callbacks -------------------------------------------------------------------------------------------------


def test_a_cancelled_query_is_not_computed():
    with held() as (s, gate, _):
        futures = s.submit_many([x(i) for i in (1, 2, 3)])
        assert futures[0].cancel()
        assert futures[2].cancel()
        gate.opened.set()
        assert futures[1].result(WAIT_S).batch == 1
    assert gate.batches == [[0], [2]]


def test_a_cancelled_head_does_not_count_for_the_slack():
    slacks_ms = []

    def policy(profile, state):
        slacks_ms.append(state.slack_ms)
        return Decision(SUBNETS[0], 4)

    with held(policy=policy, clock=lambda: 0.0) as (s, gate, _):
        urgent, calm = s.submit(x(1), slo_ms=10), s.submit(x(2), slo_ms=500)
        urgent.cancel()
        gate.opened.set()
        calm.result(WAIT_S)
    assert slacks_ms == pytest.approx([LONG_MS, 500])


def test_an_answer_to_a_query_cancelled_while_it_ran_is_dropped():
    with held() as (_, _, first):
        assert first.cancel()
    assert first.cancelled()


def test_an_answered_query_cannot_be_cancelled():
    with serve() as s:
        future = s.submit(x(1))
        future.result(WAIT_S)
        assert not future.cancel()


@pytest.mark.parametrize("callback", [lambda f: 1 / 0, lambda f: sys.exit(1)], ids=["error", "exit"])
def test_a_callback_that_raises_fails_no_query(callback, caplog):
    with held() as (s, gate, first):
        first.add_done_callback(callback)
        gate.opened.set()
        assert first.result(WAIT_S).output[0] == 0
        assert s.submit(x(1)).result(WAIT_S).output[0] == 1
        assert s.health()["alive"] == 1
    assert caplog.records


# -- failures -----------------------------------------------------------------------------------------------------------------


def test_a_batch_that_failed_is_tried_again():
    failures = iter([fail, lambda *_: None, fail])  # in between it is asked whether it can do anything
    with serve(fake(lambda *a: next(failures, lambda *_: None)(*a))) as s:
        assert s.submit(x(3)).result(WAIT_S).output == (3.0, 0)
        assert s.health()["failures"] == 2
        assert "the device burns" in s.health()["last_error"]
        assert s.health()["alive"] == 1


def test_a_broken_worker_leaves_and_the_others_answer_everything():
    with serve(fake(fail, name="bad"), fake(name="good"), max_failures=2, slo_ms=1) as s:
        while s.health()["alive"] == 2:
            futures = s.submit_many([x(i) for i in range(8)], slo_ms=LONG_MS)
            assert [f.result(WAIT_S).output[0] for f in futures] == list(range(8))
        assert s.submit(x(1), slo_ms=LONG_MS).result(WAIT_S).output == (1.0, 0)
        assert s.health()["failures"] == 2


def test_a_query_that_keeps_failing_gets_the_cause_and_does_not_end_the_only_worker():
    def choke(subnet, batch_size, inputs):
        if any(i == 13 for i in inputs):
            raise RuntimeError("bad luck")

    with serve(fake(choke), policy=always(0, batch=1)) as s:
        for _ in range(3):
            with pytest.raises(
                errors.InferenceError, match=r"fake:0 failed on .* from 13 to 13: 3 batches.*bad luck.*server's log"
            ) as caught:
                s.submit(x(13)).result(WAIT_S)
            assert isinstance(caught.value.__cause__, RuntimeError)
            assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)


def test_a_failed_query_without_slack_is_not_tried_again():
    now_s = [0.0]

    def slow_failure(*_):
        now_s[0] += 1.0
        fail()

    with serve(fake(slow_failure), clock=lambda: now_s[0]) as s:
        with pytest.raises(errors.InferenceError, match="no slack was left"):
            s.submit(x(1), slo_ms=500).result(WAIT_S)
        assert s.health()["failures"] == 1


class OneTooFew(FakeEngine):
    def run(self, subnet, batch_size, inputs):
        return super().run(subnet, batch_size, inputs)[1:]


def test_a_wrong_number_of_outputs_is_a_failure():
    with serve(OneTooFew(PROFILE, speed=math.inf)) as s, pytest.raises(errors.InferenceError, match="0 outputs for 1 inputs"):
        s.submit(x(1)).result(WAIT_S)


def test_when_the_last_worker_leaves_everything_fails_with_the_cause():
    gate = Gate()

    def burn(*a):
        gate(*a)
        fail()

    with serve(fake(burn), max_failures=1) as s:
        futures = [s.submit(x(0))]
        assert gate.entered.wait(WAIT_S)
        futures += s.submit_many([x(i) for i in range(5)])
        gate.opened.set()
        for f in futures:
            with pytest.raises(errors.WorkersLostError, match=r"last of 1 workers.*the device burns.*open a new server"):
                f.result(WAIT_S)
        with pytest.raises(errors.WorkersLostError, match="the device burns"):
            s.submit(x(1))
        assert s.health()["alive"] == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (fail, "the device burns"),
        (lambda *_: Decision(Subnet((9,)), 1), "not in the profile"),
        (lambda *_: Decision(SUBNETS[0], 0), "batch of at least 1, got 0"),
        (lambda *_: None, "AttributeError"),
    ],
    ids=["raises", "unknown subnet", "empty batch", "no decision"],
)
def test_a_policy_that_fails_fails_its_queries_and_no_worker(policy, message):
    with serve(policy=policy) as s:
        for _ in range(3):
            with pytest.raises(errors.InferenceError, match=f"the policy failed.*{message}.*mend it"):
                s.submit(x(1)).result(WAIT_S)
        assert (s.health()["alive"], s.health()["failures"]) == (1, 0)


def test_a_stuck_worker_is_abandoned_its_batch_answered_by_another_and_its_late_answer_dropped():
    answers = []
    with held(2, stall_s=0.05) as (s, gate, first):
        first.add_done_callback(answers.append)
        assert first.result(WAIT_S).output == (0.0, 0)
        assert gate.batches == [[0], [0]]
        assert (s.health()["alive"], s.health()["abandoned"]) == (1, 1)
        gate.opened.set()
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)
    assert answers == [first]


def test_when_the_only_worker_is_stuck_its_queries_fail():
    with held(stall_s=0.05) as (s, _, first):
        waiting = s.submit(x(1))
        for f in (first, waiting):
            with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
                f.result(WAIT_S)
        assert s.health()["abandoned"] == 1


# -- closing ------------------------------------------------------------------------------------------------------------------


def test_closing_answers_what_waits():
    with held() as (s, gate, _):
        futures = s.submit_many([x(i) for i in range(20)])
        threading.Timer(0.02, gate.opened.set).start()
        s.close()
        assert all(f.done() for f in futures)
        assert [f.result().output[0] for f in futures] == list(range(20))


def test_closing_without_draining_fails_what_waits_and_answers_what_runs():
    with held() as (s, gate, first):
        waiting = s.submit(x(1))
        threading.Timer(0.02, gate.opened.set).start()
        s.close(drain=False)
        assert first.result(0).output == (0.0, 0)
        with pytest.raises(errors.ServerClosedError, match="closed without draining"):
            waiting.result(0)


def test_leaving_the_context_on_an_exception_fails_what_waits():
    gate, waiting = Gate(), []

    def interrupted():
        with serve(fake(gate)) as s:
            s.submit(x(0))
            assert gate.entered.wait(WAIT_S)
            waiting.append(s.submit(x(1)))
            threading.Timer(0.02, gate.opened.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with pytest.raises(errors.ServerClosedError):
        waiting[0].result(0)


def test_a_closed_server_refuses_and_closes_again():
    s = serve()
    threads = [threading.Thread(target=s.close) for _ in range(3)]
    for t in threads:
        t.start()
    s.close()
    for t in threads:
        t.join(WAIT_S)
        assert not t.is_alive()
    with pytest.raises(errors.ServerClosedError, match="takes no queries; open a new one"):
        s.submit(x(1))
    assert s.health()["closed"]


def test_closing_with_a_timeout_abandons_the_stuck_and_fails_every_query_left():
    with held() as (s, _, first):
        waiting = s.submit(x(1))
        s.close(timeout_s=0.01)
        assert s.health()["abandoned"] == 1
        for f in (first, waiting):
            with pytest.raises(errors.ServerClosedError, match=r"after 0\.01 s"):
                f.result(0)


def test_a_callback_may_close_its_own_server():
    with held() as (s, gate, first):
        first.add_done_callback(lambda f: s.close())
        waiting = s.submit(x(1))
        gate.opened.set()
        assert waiting.result(WAIT_S).output == (1.0, 0)


def test_a_server_that_nobody_holds_ends_its_threads_and_fails_what_waits():
    gate = Gate()
    s = serve(fake(gate))
    running = s.submit(x(0))
    assert gate.entered.wait(WAIT_S)
    waiting = s.submit(x(1))
    del s
    gc.collect()
    with pytest.raises(errors.ServerClosedError):
        waiting.result(WAIT_S)
    gate.opened.set()
    assert running.result(WAIT_S).output == (0.0, 0)


def test_the_runtime_is_tuned_while_any_of_several_servers_is_open():
    before = sys.getswitchinterval()
    a, b = serve(tune_runtime=True), serve(tune_runtime=True)
    a.close()
    assert sys.getswitchinterval() == pytest.approx(runtime.SWITCH_INTERVAL_S)
    assert gc.get_freeze_count() > 0
    b.close()
    assert sys.getswitchinterval() == before
    assert gc.get_freeze_count() == 0


def test_objects_that_were_frozen_before_stay_frozen():
    gc.freeze()
    try:
        with runtime.low_latency():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("found", "meanwhile"),
    [((700, 10, 10), runtime.GC_THRESHOLDS), ((0, 10, 10), (0, 10, 10)), ((30_000, 5, 500), (30_000, 20, 500))],
)
def test_collections_come_less_often_while_a_server_is_open_but_no_oftener_for_who_chose_otherwise(found, meanwhile):
    before = gc.get_threshold()
    gc.set_threshold(*found)
    try:
        with runtime.low_latency(), runtime.low_latency():
            assert gc.get_threshold() == meanwhile
        assert gc.get_threshold() == found
    finally:
        gc.set_threshold(*before)


# -- everything at once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("expire", [False, True])
def test_each_query_is_answered_exactly_once_with_threads_submitting_from_all_sides(seed, expire):
    per_thread, counts, outcomes, lock = 300, collections.Counter(), collections.Counter(), threading.Lock()
    rng = random.Random(seed)

    def flaky(subnet, batch_size, inputs):
        if rng.random() < 0.05:
            fail()
        if rng.random() < 0.02:
            time.sleep(0.002)

    def answered(value, future):
        with lock:
            counts[value] += 1
        if not future.cancelled() and future.exception() is None:
            assert future.result().output[0] == value

    def submit(s, k, mine):
        draw = random.Random(100 * seed + k)
        for i in range(per_thread):
            value = per_thread * k + i
            slo_ms, floor = draw.choice([1.0, 5.0, 36.0, 1000.0]), draw.choice([0.0, 0.0, 0.75, 0.8])
            while True:
                with contextlib.suppress(errors.QueueFullError):
                    future = s.submit(x(value), slo_ms=slo_ms, min_accuracy=floor)
                    break
                time.sleep(0.001)
            future.add_done_callback(lambda f, value=value: answered(value, f))
            mine.append((value, floor, future))
            if draw.random() < 0.1:
                future.cancel()

    submitted = [[] for _ in range(4)]
    engines = [fake(flaky, name=f"fake:{i}") for i in range(3)]
    with serve(*engines, policy=by_slack, expire=expire, slo_ms=1, max_queue=64, max_failures=50) as s:
        threads = [threading.Thread(target=submit, args=(s, k, mine)) for k, mine in enumerate(submitted)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for value, floor, future in itertools.chain(*submitted):
        assert future.done()
        assert counts[value] == 1
        if future.cancelled():
            outcomes["cancelled"] += 1
        elif (error := future.exception()) is not None:
            assert isinstance(error, errors.InferenceError | errors.DeadlineExpiredError)
            outcomes[type(error).__name__] += 1
        else:
            assert future.result().output[0] == value
            assert future.result().accuracy >= floor
            outcomes["answered"] += 1
    assert outcomes["answered"] > 2 * per_thread
    assert outcomes["cancelled"] > 0


def test_a_cancelled_query_that_has_stepped_back_is_forgotten():
    submitted, late, lost = threading.Event(), [], []

    def policy(profile, state):
        late.append(state.late)
        return Decision(SUBNETS[0], 1, defer_ms=1000.0)

    def on_run(subnet, size, inputs):
        if inputs == [0]:
            submitted.wait(WAIT_S)
        if inputs == [2]:
            lost[0].cancel()

    fake = FakeEngine(PROFILE, speed=math.inf, on_run=on_run)
    with Server.from_engines([fake], PROFILE, policy=policy, slo_ms=LONG_MS, tune_runtime=False) as s:
        s.submit(np.float32(0))
        lost.append(s.submit(np.float32(1), slo_ms=1.0))
        others = [s.submit(np.float32(x)) for x in (2, 3)]
        submitted.set()
        assert [f.result(WAIT_S).output[0] for f in others] == [2, 3]
    assert late[2:] == [0]  # when the last is taken, after the cancellation
