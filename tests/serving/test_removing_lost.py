"""Lost workers that are removed: nobody waits for their process any more."""

import threading

import pytest
from fakes import WAIT_S, outcomes, wait_until, x
from places import Place, places, return_threads, serve, states

from superserve_jax import errors


def test_a_lost_worker_that_is_removed_does_not_come_back():
    first, second = places(2)
    with serve([first, second]) as s:
        first.engine.dead.set()
        wait_until(lambda: [s.submit(x(1)).result(WAIT_S)] and states(s)["far:0"] == "lost")
        s.remove_worker("far:0")
        assert states(s) == {"far:1": "idle", "far:0": "removed"}
        first.is_back.set()
        wait_until(lambda: not return_threads())
        assert (first.made, s.health()["alive"]) == (1, 1)
        with pytest.raises(errors.UnknownNameError):
            s.remove_worker("far:0")


@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_worker_that_is_removed_while_its_engine_is_made_does_not_join(count):
    first, *others = places(count)
    begun, go_on, make = threading.Event(), threading.Event(), first.make_engine
    with serve([first, *others]) as s:
        first.make_engine = lambda source: (begun.set(), go_on.wait(WAIT_S), make(source))[2]
        first.is_back.set()
        first.engine.dead.set()
        future = s.submit(x(1))
        wait_until(lambda: [s.submit(x(1))] and begun.is_set())
        s.remove_worker("far:0")
        if not others:
            with pytest.raises(errors.WorkersLostError):
                future.result(0)
        go_on.set()
        wait_until(lambda: not return_threads())
        assert (first.made, s.health()["joined"], states(s)["far:0"]) == (2, count, "removed")


def test_queries_fail_if_the_only_lost_worker_is_removed():
    [only] = places(1)
    with serve([only]) as s:
        only.engine.dead.set()
        future = s.submit(x(0))
        wait_until(lambda: states(s).get("far:0") == "lost")
        s.remove_worker("far:0")
        with pytest.raises(errors.WorkersLostError, match="the process is gone"):
            future.result(WAIT_S)
        s.add_worker(Place("other"))
        assert outcomes([s.submit(x(3))]) == [3]


def test_a_live_worker_is_removed_before_a_lost_one_of_its_name():
    first, second = places(2)
    with serve([first, second]) as s:
        first.engine.dead.set()
        wait_until(lambda: [s.submit(x(1)).result(WAIT_S)] and states(s)["far:0"] == "lost")
        s.add_worker(Place("far:0"))
        s.remove_worker("far:0")
        assert states(s)["far:0"] == "removed"
        assert len(return_threads()) == 1
        first.is_back.set()
        wait_until(lambda: states(s)["far:0"] == "idle")
