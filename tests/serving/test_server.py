"""The threaded server on engines without a model: input x answers (x, rank of the subnet)."""

import math
import sys
import threading
import time
import typing

import numpy as np
import pytest
from fakes import LONG_MS, SUBNETS, WAIT_S, always, fake, held, outcomes, serve, several, wait_until, x

from superserve_jax import errors
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving import server
from superserve_jax.serving.options import Options, ServerOptions, check_options
from superserve_jax.serving.server import Server

# -- answers ------------------------------------------------------------------------------------------------------------------


def test_a_reply_says_what_was_computed_by_which_subnet_and_when():
    with serve(policy=always(1)) as s:
        reply = s.submit(x(5)).result(WAIT_S)
    assert reply.output == (5.0, 1)
    assert (reply.subnet, reply.accuracy, reply.met_slo, reply.batch) == (SUBNETS[1], 0.75, True, 1)
    assert reply.latency_ms == pytest.approx(reply.queue_ms + reply.compute_ms)


def test_batches_are_taken_by_deadline_and_no_larger_than_decided():
    with held(policy=always(0, batch=2)) as (s, gate, _):
        futures = [s.submit(x(i), slo_ms=1e3 * ms) for i, ms in ((1, 50), (2, 40), (3, 30), (4, 20), (5, 10))]
        gate.opened.set()
        replies = [f.result(WAIT_S) for f in futures]
    assert gate.batches == [[0], [5, 4], [3, 2], [1]]
    assert [r.batch for r in replies] == [1, 2, 2, 2, 2]


def test_a_decision_larger_than_the_largest_batch_size_is_cut_to_it():
    with held(policy=always(0, batch=99)) as (s, gate, _):
        s.submit_many(x(range(6)))
    assert [len(b) for b in gate.batches] == [1, 4, 2]


def test_the_policy_sees_the_state_of_the_queue():
    states = []

    def policy(profile, state):
        states.append(state)
        return Decision(SUBNETS[0], 4)

    now_s = [100.0]
    with held(2, policy=policy, clock=lambda: now_s[0]) as (s, _, first):
        outcomes([s.submit(x(1))])  # on the other worker
    assert [(t.now_s, t.waiting, t.floors, t.workers) for t in states] == [(100.0, 1, (), 2)] * 2
    assert all(t.slack_ms == pytest.approx(LONG_MS) for t in states)
    assert first.done()


def test_idle_workers_wake_one_another_until_all_work_is_taken():
    together = threading.Barrier(4)
    with serve(*several(4, lambda *_: together.wait(WAIT_S)), policy=always(0, batch=1)) as s:
        assert outcomes(s.submit_many(x(range(4)))) == list(range(4))


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


def test_every_option_has_a_type_for_the_client_and_a_default():
    assert typing.get_type_hints(Options) == typing.get_type_hints(ServerOptions)
    assert check_options({}) == Options()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *((name, 0, f"{name} must be .*got 0") for name in ("max_queue", "max_tries", "max_failures", "stall_s")),
        ("max_queue_bytes", 3, "max_queue_bytes=3, but one input has 4"),
        ("overlap", "yes", "overlap must be True, False or None"),
        ("policy", "slakfit", "did you mean 'slackfit'"),
    ],
)
def test_a_bad_option_is_refused_with_its_value_or_the_remedy(option, value, message):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError), match=message):
        serve(**{option: value})


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
    assert [s.snapshot()["queries"][name] for name in ("arrived", "met", "expired")] == [3, 2, 1]


# -- cancelling and callbacks -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("callback", [lambda f: 1 / 0, lambda f: sys.exit(1)], ids=["error", "exit"])
def test_a_callback_that_raises_fails_no_query(callback, caplog):
    with held() as (s, gate, first):
        first.add_done_callback(callback)
        gate.opened.set()
        assert outcomes([first, s.submit(x(1))]) == [0, 1]
        assert s.health()["alive"] == 1
    assert caplog.records


def test_a_cancelled_query_that_was_deferred_does_not_count_as_late():
    submitted, late, lost = threading.Event(), [], []

    def policy(profile, state):
        late.append(state.late)
        return Decision(SUBNETS[0], 1, defer_ms=1000.0)

    def on_run(subnet, size, inputs):
        if inputs == [0]:
            submitted.wait(WAIT_S)
        if inputs == [2]:
            lost[0].cancel()

    with serve(fake(on_run), policy=policy) as s:
        s.submit(x(0))
        lost.append(s.submit(x(1), slo_ms=1.0))
        others = s.submit_many(x([2, 3]))
        submitted.set()
        assert outcomes(others) == [2, 3]
    assert late[2:] == [0]  # when the last is taken, after the cancellation


# -- the background load of profiling -----------------------------------------------------------------------------------------


def test_the_load_submits_queries_and_no_more_than_are_due(monkeypatch):
    counted = []
    submit_many = Server.submit_many
    monkeypatch.setattr(Server, "submit_many", lambda self, xs: counted.append(len(xs)) or submit_many(self, xs))
    before_s = time.monotonic()
    with server.background_traffic(5000.0):
        time.sleep(0.2)
        wait_until(lambda: counted)
    lasted_s = time.monotonic() - before_s
    assert 0 < sum(counted) <= 5000.0 * lasted_s
