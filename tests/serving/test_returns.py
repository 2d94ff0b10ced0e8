"""Workers that come back when the process of their engine answers again, and queries that wait for them."""

import gc
import os
import subprocess
import sys
import threading
import time

import fakes
import pytest
from fakes import WAIT_S, outcomes, wait_until, x
from places import Place, places, return_threads, serve, states

from superserve_jax import errors
from superserve_jax.serving import makers


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
        wait_until(lambda: not return_threads())
        assert s.health()["alive"] == 0


def test_queries_fail_if_the_only_worker_does_not_come_back_in_time(monkeypatch):
    monkeypatch.setattr("superserve_jax.serving.lost._HOPE_S", 0.05)
    [only] = places(1)
    with serve([only], stall_s=0.2) as s:  # it is looked at four times as often
        only.engine.dead.set()
        future = s.submit(x(0))
        with pytest.raises(errors.WorkersLostError, match="the process is gone"):
            future.result(WAIT_S)
        with pytest.raises(errors.WorkersLostError):
            s.submit(x(0))
        only.is_back.set()  # the thread still waits for the process
        wait_until(lambda: s.health()["alive"] == 1)
        assert outcomes([s.submit(x(3))]) == [3]


@pytest.mark.parametrize("slow", ["is_up", "make_engine"])
def test_queries_do_not_wait_longer_if_a_place_is_slow_to_answer_or_to_make_an_engine(monkeypatch, slow):
    monkeypatch.setattr("superserve_jax.serving.lost._HOPE_S", 0.05)
    [only] = places(1)
    only.is_back.set()
    goes_on = threading.Event()
    with serve([only], stall_s=0.2) as s:
        do = getattr(only, slow)
        setattr(only, slow, lambda argument: (goes_on.wait(WAIT_S), do(argument))[1])
        only.engine.dead.set()
        future = s.submit(x(0))
        with pytest.raises(errors.WorkersLostError):
            future.result(WAIT_S)
        with pytest.raises(errors.WorkersLostError):
            s.submit(x(0))
        assert only.made == 1
        goes_on.set()
        wait_until(lambda: s.health()["alive"] == 1)
        assert outcomes([s.submit(x(3))]) == [3]


def test_an_abandoned_worker_comes_back_with_its_process():
    [only] = places(1)
    with serve([only], stall_s=0.1) as s:
        hung = only.engine
        hung.answers.clear()
        futures = s.submit_many(x(range(4)))
        wait_until(lambda: states(s)["far:0"] == "abandoned")
        waiting = s.submit(x(4))
        assert only.made == 1
        only.is_back.set()
        assert outcomes([*futures, waiting]) == [0, 1, 2, 3, 4]
        assert (only.made, s.health()["abandoned"], states(s)) == (2, 1, {"far:0": "idle"})
        hung.answers.set()


def test_a_worker_that_hangs_in_the_policy_does_not_come_back():
    [only] = places(1)
    only.is_back.set()
    goes_on = threading.Event()
    with serve([only], stall_s=0.1, policy=lambda *_: goes_on.wait(WAIT_S)) as s:
        with pytest.raises(errors.WorkersLostError):
            s.submit(x(0)).result(WAIT_S)
        with pytest.raises(errors.WorkersLostError):
            s.submit(x(0))
        assert only.made == 1
        goes_on.set()


def test_the_thread_that_waits_for_a_process_ends_with_a_server_that_is_collected():
    [only] = places(1)
    s = serve([only])
    only.engine.dead.set()
    future = s.submit(x(0))
    wait_until(return_threads)
    del s
    gc.collect()
    assert isinstance(future.exception(WAIT_S), errors.ServerClosedError)
    wait_until(lambda: not return_threads())


EXIT = """
import atexit, logging, threading, time
from fakes import wait_until, x
from places import Place, places, return_threads, serve

def left():  # it runs after the server's own call at exit
    print([thread.name for thread in return_threads()])

logging.disable()
atexit.register(left)
first, second = places(2)
s = serve([first, second])
first.engine.dead.set()
second.engine.dead.set()
s.submit(x(0))
wait_until(lambda: len(return_threads()) == 2)
"""


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("", []),
        ("first.make_engine = lambda _: time.sleep(1e6)\nfirst.is_back.set()\ntime.sleep(0.3)", ["far:0"]),
    ],
    ids=["waiting", "making an engine"],
)
def test_a_lost_process_does_not_keep_the_interpreter(code, left):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-c", EXIT + code]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str([f"superserve-return-{name}" for name in left])


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
    engine, _ = only.make_engine(None)
    engine.place = None
    with fakes.serve(engine) as s:
        engine.dead.set()
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


def test_a_query_does_not_wait_for_a_process_that_starts_while_the_server_closes():
    [only] = places(1)
    begun, go_on, make = threading.Event(), threading.Event(), only.make_engine

    def make_slowly(source):
        begun.set()
        go_on.wait()
        return make(source)

    s = serve([only])
    only.make_engine = make_slowly
    only.engine.dead.set()
    future = s.submit(x(0))
    only.is_back.set()
    assert begun.wait(WAIT_S)
    s.close()
    try:
        assert isinstance(future.exception(WAIT_S), errors.SuperServeError)
    finally:
        go_on.set()
    wait_until(lambda: not return_threads())


def test_the_error_of_one_process_does_not_wait_for_the_others():
    class Broken:
        def make_engine(self, source):
            raise errors.ExportError("no export")

    def make_slowly(source):
        go_on.wait(WAIT_S)
        ended.set()

    slow, go_on, ended = Place("slow"), threading.Event(), threading.Event()
    slow.make_engine = make_slowly
    with pytest.raises(errors.ExportError, match="no export"):
        makers.make_all([slow, Broken()], None)  # type: ignore[list-item, arg-type]
    assert not ended.is_set()
    go_on.set()


def test_nobody_waits_while_a_process_starts():
    slow = Place("slow")
    begun, go_on, make = threading.Event(), threading.Event(), slow.make_engine

    def make_slowly(source):
        begun.set()
        assert go_on.wait(WAIT_S)
        return make(source)

    slow.make_engine = make_slowly
    with serve(places(2)) as s:
        adding = threading.Thread(target=s.add_worker, args=(slow,))
        adding.start()
        assert begun.wait(WAIT_S)
        s.add_worker(Place("fast"))
        assert s.health()["alive"] == 3
        go_on.set()
        adding.join(WAIT_S)
        assert s.health()["alive"] == 4


def test_a_swap_while_all_workers_are_lost_says_so():
    [only] = places(1)
    with serve([only]) as s:
        only.engine.dead.set()
        s.submit(x(0))
        wait_until(lambda: states(s)["far:0"] == "lost")
        with pytest.raises(errors.WorkersLostError):
            s.pool.swaps.swappable()
        only.is_back.set()
