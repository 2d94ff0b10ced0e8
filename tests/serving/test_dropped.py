"""Servers that are dropped without `close`, also as part of a reference cycle."""

import functools
import gc
import itertools
import threading
import time
import weakref

import fakes
import pytest
from bad import within
from fakes import WAIT_S, outcomes, wait_until, x

from superserve_jax.serving import runtime

serve = functools.partial(fakes.serve, tune_runtime=True, stall_s=0.2)


class Owner:
    """Its server is part of a reference cycle."""

    def __init__(self):
        self.me = self
        self.server = serve(fakes.fake(name="owned"))
        future = self.server.submit(x(1))
        future.add_done_callback(self.answered)
        future.result(WAIT_S)

    def answered(self, future):
        self.future = future


def threads_of_owned():
    return [t for t in threading.enumerate() if t.name == "superserve-owned"]


@pytest.fixture(autouse=True)
def soon_idle(monkeypatch):
    monkeypatch.setattr(runtime, "IDLE_S", 0.2)
    monkeypatch.setattr(runtime, "COLLECTING_SHARE", 1.0)
    with within(300):
        yield
        assert gc.get_freeze_count() == 0


def test_a_dropped_server_in_a_reference_cycle_is_collected_while_the_process_is_idle():
    owner = Owner()
    gone = weakref.ref(owner.server)
    assert threads_of_owned()
    del owner
    wait_until(lambda: gone() is None and not threads_of_owned())
    wait_until(lambda: gc.get_freeze_count() == 0)


def test_no_collection_comes_between_queries():
    owner = Owner()
    gone = weakref.ref(owner.server)
    del owner
    with serve() as busy:
        asked_s = [time.monotonic()]
        while asked_s[-1] < asked_s[0] + 0.8:
            assert outcomes([busy.submit(x(1))]) == [1]
            time.sleep(0.02)
            asked_s.append(time.monotonic())
        longest_gap_s = max(later - earlier for earlier, later in itertools.pairwise(asked_s))
        assert gone() is not None or longest_gap_s > 0.1  # if this machine stood still, the process was idle
        wait_until(lambda: gone() is None and not threads_of_owned())
        wait_until(lambda: gc.get_freeze_count() > 0)  # again, after this collection
        assert outcomes([busy.submit(x(2))]) == [2]


def test_a_finalizer_may_use_and_close_a_server_in_this_collection():
    answers = []

    class Garbage:
        def __init__(self, s):
            self.me, self.server = self, s

        def __del__(self):
            answers.extend(outcomes([self.server.submit(x(3))]))
            self.server.close()

    with serve() as s:
        garbage = Garbage(s)
        with serve():  # freezes the garbage
            del garbage
            wait_until(lambda: s.health()["closed"])
    assert answers == [3]


def test_objects_that_the_program_froze_itself_stay_frozen():
    gc.freeze()
    try:
        with serve():
            time.sleep(0.6)
            assert gc.get_freeze_count() > 1000
            assert not runtime.collection_is_due(used=False)
        runtime.collect_frozen()  # its thread begins after the server was closed
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
