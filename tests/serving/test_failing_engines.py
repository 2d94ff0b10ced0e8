"""What a server does when an engine or the policy raises, or hangs."""

import fakes
import pytest
from fakes import SUBNETS, WAIT_S, Gate, fail, held, outcomes, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.scheduling.policies import Decision
from superserve_jax.subnet import Subnet


def test_a_batch_that_failed_is_tried_again():
    failures = iter([fail, lambda *_: None, fail])  # in between it is asked whether it can do anything
    with fakes.serve(fakes.fake(lambda *a: next(failures, lambda *_: None)(*a))) as s:
        assert s.submit(x(3)).result(WAIT_S).output == (3.0, 0)
        assert (s.health()["failures"], s.health()["alive"]) == (2, 1)
        assert "the device burns" in s.health()["last_error"]


def test_a_failed_query_without_slack_is_not_tried_again():
    now_s = [0.0]

    def slow_failure(*_):
        now_s[0] += 1.0
        fail()

    with fakes.serve(fakes.fake(slow_failure), clock=lambda: now_s[0]) as s:
        with pytest.raises(errors.InferenceError, match="no slack was left"):
            s.submit(x(1), slo_ms=500).result(WAIT_S)
        assert s.health()["failures"] == 1


def test_when_the_last_worker_leaves_everything_fails_with_the_cause_until_another_joins():
    with held(then=fail, max_failures=1) as (s, gate, first):
        futures = [first, *s.submit_many(x(range(5)))]
        gate.opened.set()
        for f in futures:
            with pytest.raises(errors.WorkersLostError, match=r"last of 1 workers.*the device burns"):
                f.result(WAIT_S)
        for ask in (lambda: s.submit(x(1)), s.pool.swappable):
            with pytest.raises(errors.WorkersLostError, match=r"the device burns.*add a worker or open a new server"):
                ask()
        assert s.health()["alive"] == 0
        assert s.add_worker(fakes.fake()) == "fake:0"
        assert outcomes([s.submit(x(1))]) == [1]


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
    with fakes.serve(policy=policy) as s:
        for _ in range(3):
            with pytest.raises(errors.InferenceError, match=f"the policy failed.*{message}.*fix it"):
                s.submit(x(1)).result(WAIT_S)
        assert (s.health()["alive"], s.health()["failures"], s.snapshot()["queries"]["failed"]) == (1, 0, 3)


@pytest.mark.parametrize(("make", "running"), [(FakeEngine, 4), (FakeDevice, 8)])
def test_the_batches_of_a_stuck_worker_are_answered_by_another_and_its_late_answers_dropped(make, running):
    gate, answers = Gate(), []
    with fakes.serve(fakes.fake(gate, make=make), stall_s=0.1) as s:
        futures = s.submit_many(x(range(12)))
        futures[0].add_done_callback(answers.append)
        with gate.holding():
            s.add_worker(fakes.fake(name="fake:1"))
            assert outcomes(futures) == list(range(12))
            assert (s.health()["alive"], s.health()["abandoned"]) == (1, 1)
        assert outcomes([s.submit(x(1))]) == [1]
    counts = s.snapshot()
    assert [w["state"] for w in counts["workers"]] == ["abandoned", "left"]
    assert (counts["queries"]["met"], counts["queries"]["requeued"], counts["running"]) == (13, running, 0)
    assert answers == futures[:1]


@pytest.mark.parametrize("make", [FakeEngine, FakeDevice])
def test_when_the_only_worker_is_stuck_its_queries_fail(make):
    gate = Gate()
    with fakes.serve(fakes.fake(gate, make=make), stall_s=0.05) as s:
        futures = s.submit_many(x(range(12)))
        with gate.holding():
            for f in futures:
                with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
                    f.result(WAIT_S)
            assert s.health()["abandoned"] == 1


def test_a_process_that_stood_still_before_a_batch_began_does_not_extend_the_time_limit_of_the_batch():
    now_s = [0.0]
    with held(clock=lambda: now_s[0], stall_s=1.0) as (s, _, first):
        s.pool.abandon_stuck(excused_s=1e3)
        now_s[0] = 5.0
        s.pool.abandon_stuck()
        assert s.health()["abandoned"] == 1
        with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
            first.result(WAIT_S)
