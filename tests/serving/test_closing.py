"""How a server is closed, and how it leaves the process."""

import gc
import sys
import threading

import pytest
from fakes import WAIT_S, Gate, fake, held, outcomes, serve, threads, wait_until, x

from superserve_jax import errors
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.serving import runtime


def own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("superserve")]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    wait_until(lambda: not own_threads())


def test_closing_answers_the_waiting_queries():
    with held() as (s, gate, _):
        futures = s.submit_many(x(range(20)))
        with threads(s.close):
            wait_until(lambda: s.health()["closed"])
            gate.opened.set()
        assert [f.result(0).output[0] for f in futures] == list(range(20))


@pytest.mark.parametrize("error", [None, KeyError], ids=["closed", "left by an error"])
@pytest.mark.parametrize(("make", "running"), [(FakeEngine, 4), (FakeDevice, 8)])
def test_without_draining_running_batches_are_answered_and_waiting_queries_fail(make, running, error):
    gate = Gate()
    s = serve(fake(gate, make=make))
    futures = s.submit_many(x(range(12)))
    with gate.holding():
        futures[-1].add_done_callback(lambda _: gate.opened.set())
        s.close(drain=False) if error is None else s.__exit__(error, error())
    assert [f.result(0).output[0] for f in futures[:running]] == list(range(running))
    for f in futures[running:]:
        with pytest.raises(errors.ServerClosedError, match="closed without draining"):
            f.result(0)
    queries = s.snapshot()["queries"]
    assert (queries["met"], queries["failed"]) == (running, 12 - running)


def test_a_closed_server_refuses_and_closes_again():
    s = serve()
    with threads(*[s.close] * 3):
        s.close()
    with pytest.raises(errors.ServerClosedError, match="takes no queries; open a new one"):
        s.submit(x(1))
    assert s.health()["closed"]


def test_closing_with_a_timeout_abandons_stuck_workers_and_fails_every_query_left():
    with held() as (s, _, first):
        waiting = s.submit_many(x(range(20)))
        s.close(timeout_s=0.01)
        assert s.health()["abandoned"] == 1
        assert own_threads() == ["superserve-fake:0"]
        for f in (first, *waiting):
            with pytest.raises(errors.ServerClosedError, match=r"after 0\.01 s"):
                f.result(0)


def test_a_callback_may_close_its_own_server():
    with held() as (s, gate, first):
        first.add_done_callback(lambda f: s.close())
        waiting = s.submit(x(1))
        gate.opened.set()
        assert outcomes([waiting]) == [1]


def test_a_server_without_references_ends_its_threads_and_fails_the_waiting_queries():
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
    assert outcomes([running]) == [0]


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
def test_collections_are_rarer_while_a_server_is_open_unless_they_were_off_or_rarer_before(found, meanwhile):
    before = gc.get_threshold()
    gc.set_threshold(*found)
    try:
        with runtime.low_latency(), runtime.low_latency():
            assert gc.get_threshold() == meanwhile
        assert gc.get_threshold() == found
    finally:
        gc.set_threshold(*before)
