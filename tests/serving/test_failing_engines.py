"""What a server does when an engine or the policy raises, or hangs."""

import math

import pytest
from fakes import PROFILE, SUBNETS, WAIT_S, Gate, always, fail, fake, held, serve, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.scheduling.policies import Decision
from superserve_jax.subnet import Subnet


def test_a_batch_that_failed_is_tried_again():
    failures = iter([fail, lambda *_: None, fail])  # in between it is asked whether it can do anything
    with serve(fake(lambda *a: next(failures, lambda *_: None)(*a))) as s:
        assert s.submit(x(3)).result(WAIT_S).output == (3.0, 0)
        assert s.health()["failures"] == 2
        assert "the device burns" in s.health()["last_error"]
        assert s.health()["alive"] == 1


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
            with pytest.raises(errors.InferenceError, match=f"the policy failed.*{message}.*fix it"):
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


def test_a_process_that_stood_still_before_a_batch_began_does_not_extend_the_time_limit_of_the_batch():
    now_s = [0.0]
    with held(clock=lambda: now_s[0], stall_s=1.0) as (s, _, first):
        s.pool.abandon_stuck(excused_s=1e3)
        now_s[0] = 5.0
        s.pool.abandon_stuck()
        assert s.health()["abandoned"] == 1
        with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
            first.result(WAIT_S)


def test_when_the_only_worker_is_stuck_its_queries_fail():
    with held(stall_s=0.05) as (s, _, first):
        waiting = s.submit(x(1))
        for f in (first, waiting):
            with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
                f.result(WAIT_S)
        assert s.health()["abandoned"] == 1
