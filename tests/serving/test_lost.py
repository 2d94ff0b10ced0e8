"""Workers whose engine is in another process that dies or is silent."""

import time

import fakes
import pytest
from fakes import WAIT_S, outcomes, wait_until, x
from places import KILLER, Place, RemoteDevice, places, serve, states

from superserve_jax import errors
from superserve_jax.serving.flight import OverlapPace


def test_batches_of_a_dead_process_are_answered_by_another_one_and_count_as_no_failure():
    first, second = places(2)
    with serve([first, second]) as s:
        first.engine.answers.clear()
        second.engine.answers.clear()
        futures = s.submit_many(x(range(32)))
        wait_until(lambda: s.snapshot()["running"] == 16)  # two batches on each
        first.engine.dead.set()
        wait_until(lambda: states(s)["far:0"] == "lost")
        second.engine.answers.set()
        assert outcomes(futures) == list(range(32))
        now = s.snapshot()
        assert now["queries"]["failed"] == 0
        assert now["queries"]["requeued"] == 8
        assert s.health()["failures"] == 0
        assert "the process is gone" in fakes.worker(s, "far:0")["last_error"]


def test_a_query_that_kills_its_process_is_given_up_and_the_others_are_answered():
    some = places(2)
    for place in some:
        place.is_back.set()
    with serve(some) as s:
        futures = s.submit_many(x([0, 1, KILLER, 2, 3, 4, 5, 6]), slo_ms=1.0)
        with pytest.raises(errors.InferenceError, match="the process is gone"):
            futures[2].result(WAIT_S)
        assert outcomes(futures[:2] + futures[3:]) == [0, 1, 2, 3, 4, 5, 6]
        wait_until(lambda: s.health()["alive"] == 2)


def test_late_queries_of_a_lost_process_expire_if_the_server_drops_late_ones():
    [only] = places(1)
    with serve([only], expire=True) as s:
        only.engine.answers.clear()
        future = s.submit(x(0), slo_ms=50.0)
        wait_until(lambda: s.snapshot()["running"] == 1)
        time.sleep(0.06)
        only.engine.dead.set()
        with pytest.raises(errors.DeadlineExpiredError):
            future.result(WAIT_S)
        wait_until(lambda: s.snapshot()["queries"]["expired"] == 1)


def test_a_process_that_is_lost_while_it_runs_blank_inputs_counts_as_lost():
    first, second = places(2)
    with serve([first, second], max_failures=1) as s:
        launch = first.engine.launch

        def fail(*batch):
            first.engine.launch = launch
            first.engine.dead.set()
            raise ValueError("no")

        first.engine.launch = fail
        while states(s)["far:0"] != "lost":
            outcomes(s.submit_many(x(range(8))))
        assert states(s)["far:1"] == "idle" or s.health()["alive"] == 1


def test_queries_are_admitted_while_no_worker_is_counted():
    [only] = places(1)
    with serve([only], admission=True) as s:
        only.engine.answers.clear()
        first = s.submit(x(0))
        wait_until(lambda: s.pool.members.fleet.strength()[1] == 0)
        second = s.submit(x(1))
        only.engine.answers.set()
        assert outcomes([first, second]) == [0, 1]


def test_a_suspect_worker_is_not_counted_until_it_answers():
    seen = []

    def policy(profile, state):
        seen.append(state.workers)
        return fakes.always(0, 1)(profile, state)

    first, second = places(2)
    live = lambda: s.pool.members.fleet.strength()[1]  # noqa: E731
    with serve([first, second], policy=policy) as s:
        first.engine.answers.clear()
        second.engine.answers.clear()
        late = s.submit_many(x(range(4)))
        wait_until(lambda: live() == 0)
        second.engine.answers.set()
        wait_until(lambda: live() == 1)
        seen.clear()
        assert outcomes([s.submit(x(7))]) == [7]
        assert seen == [1.0]
        first.engine.answers.set()
        assert outcomes(late) == [0, 1, 2, 3]
        wait_until(lambda: live() == 2)


def test_the_slowdown_follows_the_time_of_the_device_and_not_of_the_call():
    [place] = places(1)
    with serve([place], policy=fakes.always(0, 1)) as s:
        slowdown = lambda: fakes.worker(s, "far:0")["slowdown"]  # noqa: E731
        place.engine.call_s, place.engine.device_s = 0.005, 0.001  # the profile says 1 ms
        s.submit_many(x(range(50)))[-1].result(WAIT_S)
        assert slowdown() == 1.0
        place.engine.device_s = 0.005
        wait_until(lambda: [s.submit(x(0)).result(WAIT_S)] and slowdown() > 1.2)


def test_also_without_overlap_a_late_process_is_suspect_and_its_call_does_not_count():
    [place] = places(1)
    with serve([place], policy=fakes.always(0, 1), overlap=False) as s:
        place.engine.call_s, place.engine.device_s = 0.005, 0.001  # the profile says 1 ms
        s.submit_many(x(range(50)))[-1].result(WAIT_S)
        assert fakes.worker(s, "far:0")["slowdown"] == 1.0
        place.engine.answers.clear()
        late = s.submit(x(0))
        wait_until(lambda: s.pool.members.fleet.strength()[1] == 0)
        place.engine.answers.set()
        assert outcomes([late]) == [0]


def test_the_next_batch_is_handed_over_earlier_by_the_lead():
    pace = OverlapPace()
    pace.observe_device(0.01, 0.01)
    engine = RemoteDevice(Place("far"))
    before_s = pace.wake_s(1.0, 0.01, engine)
    engine.lead_s = 0.003
    assert pace.wake_s(1.0, 0.01, engine) == pytest.approx(before_s - 0.003)
