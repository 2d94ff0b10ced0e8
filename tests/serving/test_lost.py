"""Workers whose engine is in another process that dies, hangs or comes back."""

import threading
import time

import fakes
import pytest
from fakes import WAIT_S, outcomes, wait_until, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.serving.flight import OverlapPace


class Place:
    """A process that can be killed. It comes back when `is_back` is set."""

    def __init__(self, name, on_run=None):
        self.name, self.on_run = name, on_run
        self.is_back = threading.Event()
        self.made = 0
        self.engine = None

    def is_up(self, timeout_s):
        return self.is_back.wait(timeout_s)

    def make_engine(self, source):
        self.made += 1
        self.engine = RemoteDevice(self, fakes.PROFILE)
        return self.engine, fakes.PROFILE


KILLER = 99.0


class RemoteDevice(FakeDevice):
    """A device in another process."""

    lead_s = 0.0

    def __init__(self, place, profile=fakes.PROFILE):
        super().__init__(profile, name=place.name, speed=float("inf"), on_run=place.on_run)
        self.place = place
        self.dead, self.answers = threading.Event(), threading.Event()
        self.answers.set()
        self.device_s, self.call_s = None, 0.0

    def launch(self, *batch):
        if self.dead.is_set():
            raise errors.EngineLostError("the process is gone")
        launched = super().launch(*batch)
        if KILLER in [float(one) for one in batch[2]]:
            self.dead.set()

        def in_time():
            return self.answers.wait(0.0)

        def wait():
            while not self.answers.wait(1e-3):
                if self.dead.is_set():
                    raise errors.EngineLostError("the process is gone")
            if self.dead.is_set():
                raise errors.EngineLostError("the process is gone")
            time.sleep(self.call_s)
            launched.wait()

        return launched._replace(wait=wait, in_time=in_time, device_s=self.device_s and (lambda: self.device_s))


def places(count, **options):
    return [Place(f"far:{i}", **options) for i in range(count)]


def serve(some, **options):
    return fakes.serve(*(place.make_engine(None)[0] for place in some), **options)


def states(s):
    return {w["name"]: w["state"] for w in s.health()["per_worker"]}


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


def test_a_worker_comes_back_with_its_process():
    first, second = places(2)
    with serve([first, second]) as s:
        first.engine.dead.set()
        wait_until(lambda: [s.submit(x(1)).result(WAIT_S)] and states(s)["far:0"] == "lost")
        assert s.health()["alive"] == 1
        first.is_back.set()
        wait_until(lambda: s.health()["alive"] == 2)
        assert first.made == 2
        assert states(s) == {"far:1": "idle", "far:0": "idle"}


def test_queries_wait_for_the_only_worker_and_are_answered_late():
    [only] = places(1)
    with serve([only]) as s:
        only.engine.dead.set()
        waiting = s.submit_many(x(range(8)), slo_ms=1.0)
        wait_until(lambda: states(s)["far:0"] == "lost")
        late = s.submit(x(8), slo_ms=1.0)
        time.sleep(0.005)
        only.is_back.set()
        assert outcomes([*waiting, late]) == list(range(9))
        wait_until(lambda: s.snapshot()["queries"]["late"] == 9)


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


def test_a_place_that_answers_at_once_is_not_asked_in_a_busy_loop():
    [only] = places(1)
    asked = []
    only.is_up = lambda timeout_s: bool(asked.append(time.monotonic()))
    with serve([only]) as s:
        only.engine.dead.set()
        s.submit(x(0))
        wait_until(lambda: len(asked) >= 3)
        assert asked[2] - asked[0] > 0.3
        s.close(drain=False)


def test_closing_does_not_wait_for_a_return_that_needs_a_lock_of_the_caller():
    [only] = places(1)
    with serve([only]) as s:
        only.engine.dead.set()
        s.submit(x(0))
        wait_until(lambda: states(s)["far:0"] == "lost")
        with s._changing:  # noqa: SLF001 - as a signal handler during a swap
            only.is_back.set()
            time.sleep(0.3)
            s.close(drain=False)
        wait_until(lambda: not any(t.name.startswith("superserve-return") for t in threading.enumerate()))
        assert only.made == 1 or s.health()["alive"] == 0


def test_queries_are_admitted_while_no_worker_is_counted():
    [only] = places(1)
    with serve([only], admission=True) as s:
        only.engine.answers.clear()
        first = s.submit(x(0))
        wait_until(lambda: s.pool.members.fleet.strength()[1] == 0)
        second = s.submit(x(1))
        only.engine.answers.set()
        assert outcomes([first, second]) == [0, 1]


def test_queries_fail_if_the_only_worker_does_not_come_back_in_time(monkeypatch):
    monkeypatch.setattr("superserve_jax.serving.lost._HOPE_S", 0.05)
    [only] = places(1)
    with serve([only]) as s:
        only.engine.dead.set()
        future = s.submit(x(0))
        with pytest.raises(errors.WorkersLostError, match="the process is gone"):
            future.result(WAIT_S)
        with pytest.raises(errors.WorkersLostError):
            s.submit(x(0))
        only.is_back.set()  # the thread still waits for the process
        wait_until(lambda: s.health()["alive"] == 1)
        assert outcomes([s.submit(x(3))]) == [3]


def test_an_engine_that_cannot_be_made_again_is_tried_again(monkeypatch):
    monkeypatch.setattr("superserve_jax.serving.lost._PAUSE_S", 0.01)
    [only] = places(1)
    with serve([only]) as s:
        make, tries = only.make_engine, []

        def fail_twice(source):
            tries.append(1)
            if len(tries) < 3:
                raise errors.EngineLostError("again")
            return make(source)

        only.make_engine = fail_twice
        only.engine.dead.set()
        only.is_back.set()
        assert outcomes([s.submit(x(4))]) == [4]
        assert len(tries) == 3


def test_a_lost_engine_without_a_place_does_not_come_back():
    [only] = places(1)
    with serve([only]) as s:
        only.engine.place = None
        only.engine.dead.set()
        with pytest.raises(errors.WorkersLostError):
            s.submit(x(0)).result(WAIT_S)


def test_closing_does_not_wait_for_a_process():
    [only] = places(1)
    s = serve([only])
    only.engine.dead.set()
    future = s.submit(x(0))
    wait_until(lambda: states(s)["far:0"] == "lost")
    s.close()
    assert isinstance(future.exception(WAIT_S), errors.SuperServeError)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("superserve")]


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


def test_the_next_batch_is_handed_over_earlier_by_the_lead():
    pace = OverlapPace()
    pace.observe_device(0.01, 0.01)
    engine = RemoteDevice(Place("far"))
    before_s = pace.wake_s(1.0, 0.01, engine)
    engine.lead_s = 0.003
    assert pace.wake_s(1.0, 0.01, engine) == pytest.approx(before_s - 0.003)
