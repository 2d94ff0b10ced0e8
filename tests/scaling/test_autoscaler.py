"""The autoscaler of a live server: engines that do not sleep, a clock that the test moves, and simulations in this process."""

import gc
import logging
import threading
import time
import weakref

import numpy as np
import pytest
from policy_cases import make_profile

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.scaling.autoscaler import Autoscaler
from superserve_jax.scaling.what_if import Question
from superserve_jax.serving.server import Server

TABLE = make_profile([(1.0, 1.5, 2.0), (10.0, 15.0, 20.0)], [0.7, 0.8])
X = np.zeros((), np.float32)
TIMES = {"low_s": 5.0, "rest_s": 10.0, "recent_s": 10.0}


def engine(number=0):
    return FakeEngine(TABLE, name=f"fake:{number}", speed=float("inf"))


def open_server(policy, workers=1):
    return Server.from_engines([engine(i) for i in range(workers)], TABLE, policy=policy, slo_ms=10_000.0)


class Clock:
    """A clock that stands still until `pass_time` moves it."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def simulate_here(monkeypatch):
    monkeypatch.setattr(Question, "ask", Question.answer)


def pass_time(scaler, server, clock, seconds, queries=1):
    """Lets time pass, with `queries` queries in each second, and waits for workers that start."""
    for _ in range(round(seconds)):
        for future in server.submit_many([X] * queries):
            future.result(timeout=10)
        for _ in range(20):
            clock.now_s += 0.05
            scaler.look()
        wait_until(lambda: not scaler.starting)


def wait_until(condition):
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, "nothing happened"
        time.sleep(1e-3)


def alive(server):
    return [w["name"] for w in server.health()["per_worker"] if w["state"] in ("idle", "running", "answering")]


def test_workers_are_added_while_the_served_accuracy_is_too_low(clock):
    made = iter(range(1, 9))
    with open_server("fixed:smallest") as server:
        scaler = Autoscaler(
            server, lambda: engine(next(made)), target_accuracy=0.75, most=3, policy="fixed:smallest", clock=clock, **TIMES
        )
        pass_time(scaler, server, clock, 5)
        assert alive(server) == ["fake:0"]
        pass_time(scaler, server, clock, 2)
        assert sorted(alive(server)) == [
            "fake:0",
            "fake:1",
            "fake:2",
        ]  # with the smallest subnet no number of workers is enough
        pass_time(scaler, server, clock, 12)
        assert next(made) == 3


def test_the_simulator_says_how_many_are_needed(clock):
    # The server itself runs the smallest subnet. The simulated SlackFit would run the largest one with enough workers.
    with open_server("fixed:smallest") as server:
        scaler = Autoscaler(server, engine, target_accuracy=0.75, most=8, clock=clock, **TIMES)
        pass_time(scaler, server, clock, 7, queries=3)
        assert len(alive(server)) == 2


def test_the_worker_that_joined_last_is_removed_and_its_engine_is_freed(clock):
    with open_server("fixed:largest", workers=2) as server:
        last = engine(2)
        freed = weakref.ref(last)
        server.add_worker(last)
        del last
        scaler = Autoscaler(server, engine, target_accuracy=0.75, least=2, most=4, clock=clock, **TIMES)
        pass_time(scaler, server, clock, 9)
        assert len(alive(server)) == 3
        pass_time(scaler, server, clock, 3)
        assert alive(server) == ["fake:0", "fake:1"]
        gc.collect()
        assert freed() is None
        pass_time(scaler, server, clock, 25)
        assert alive(server) == ["fake:0", "fake:1"]


def test_no_worker_is_removed_that_the_traffic_needs(clock):
    with open_server("fixed:largest", workers=3) as server:
        scaler = Autoscaler(server, engine, target_accuracy=0.75, most=4, clock=clock, **TIMES)
        pass_time(scaler, server, clock, 15, queries=900)  # two workers carry 400 queries/s with the largest subnet
        assert len(alive(server)) == 3


def test_a_device_that_cannot_be_made_is_logged_and_tried_again_later(clock, caplog):
    calls = []

    def make():
        calls.append(clock())
        raise OSError("no node")

    with open_server("fixed:largest") as server, caplog.at_level(logging.WARNING):
        scaler = Autoscaler(server, make, target_accuracy=0.75, least=2, most=2, clock=clock, **TIMES)
        pass_time(scaler, server, clock, 29)
        assert len(calls) == 1
        assert "a worker could not be added: OSError('no node')" in caplog.text
        pass_time(scaler, server, clock, 3)
        assert len(calls) == 2
        assert calls[1] - calls[0] >= 30


def test_the_thread_adds_missing_workers_and_ends_with_the_context():
    with open_server("fixed:largest") as server:
        with Autoscaler(server, lambda: engine(1), target_accuracy=0.75, least=2, most=2):
            wait_until(lambda: len(alive(server)) == 2)
        assert "superserve-autoscaler" not in [thread.name for thread in threading.enumerate()]
        wait_until(lambda: not [thread for thread in threading.enumerate() if "autoscaler" in thread.name])


def test_a_worker_that_is_ready_after_the_end_is_dropped():
    asked, go = threading.Event(), threading.Event()

    def make():
        asked.set()
        go.wait(10)
        return engine(1)

    with open_server("fixed:largest") as server:
        with Autoscaler(server, make, target_accuracy=0.75, least=2, most=2) as scaler:
            assert asked.wait(10)
            assert scaler.starting == 1
        go.set()
        wait_until(lambda: not scaler.starting)
        assert alive(server) == ["fake:0"]


def test_a_worker_that_joins_during_the_end_is_removed(monkeypatch):
    asked, go, add = threading.Event(), threading.Event(), Server.add_worker

    def slow(server, device):
        asked.set()
        go.wait(10)
        return add(server, device)

    monkeypatch.setattr(Server, "add_worker", slow)
    with open_server("fixed:largest") as server:
        with Autoscaler(server, lambda: engine(1), target_accuracy=0.75, least=2, most=2) as scaler:
            assert asked.wait(10)
        go.set()
        wait_until(lambda: not scaler.starting)
        assert server.health()["joined"] == 2
        assert alive(server) == ["fake:0"]


def test_an_unexpected_error_is_logged_and_the_thread_goes_on(monkeypatch, caplog):
    snapshot, calls = Server.snapshot, iter(range(10**9))

    def fails_first(server):
        if not next(calls):
            raise ZeroDivisionError("once")
        return snapshot(server)

    with open_server("fixed:largest") as server, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(Server, "snapshot", fails_first)
        with Autoscaler(server, lambda: engine(1), target_accuracy=0.75, least=2, most=2):
            wait_until(lambda: len(alive(server)) == 2)
    assert "the autoscaler failed: ZeroDivisionError('once')" in caplog.text


def test_closing_ends_a_series_of_simulations_and_starts_no_worker(clock, monkeypatch):
    asked, made = [], []

    def ask(question):
        asked.append(question.workers)
        scaler.close()
        return question.answer()

    monkeypatch.setattr(Question, "ask", ask)
    with open_server("fixed:smallest") as server:
        scaler = Autoscaler(
            server, lambda: made.append(1), target_accuracy=0.75, most=8, policy="fixed:smallest", clock=clock, **TIMES
        )
        pass_time(scaler, server, clock, 7)
    assert (len(asked), made) == (1, [])


def test_nothing_is_started_for_a_closed_server(clock):
    server = open_server("fixed:largest")
    scaler = Autoscaler(server, lambda: pytest.fail("a node was started"), target_accuracy=0.75, least=2, most=2, clock=clock)
    server.close()
    scaler.look()
    assert scaler.starting == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_accuracy": 0.8}, r"target_accuracy=0\.8 \+ margin=0\.002 must be below the best subnet's 0\.8"),
        ({"most": 0}, "1 <= least <= most"),
        ({"make_device": "gpu"}, "make_device must be a function that returns a device, got 'gpu'"),
        ({"policy": "slakfit"}, "did you mean 'slackfit'"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with open_server("fixed:largest") as server, pytest.raises(errors.SuperServeError, match=message):
        Autoscaler(server, **{"make_device": engine, "target_accuracy": 0.75, "most": 2, **wrong})
