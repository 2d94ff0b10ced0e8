"""How a server is closed, and how it leaves the process."""

import gc
import sys
import threading
import time

import pytest
from fakes import WAIT_S, Gate, fake, held, serve, x

from superserve_jax import errors
from superserve_jax.serving import runtime


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    yield
    end_s = time.monotonic() + WAIT_S
    while names := [t.name for t in threading.enumerate() if t.name.startswith("superserve")]:
        assert time.monotonic() < end_s, names
        time.sleep(0.001)


def test_closing_answers_the_waiting_queries():
    with held() as (s, gate, _):
        futures = s.submit_many([x(i) for i in range(20)])
        threading.Timer(0.02, gate.opened.set).start()
        s.close()
        assert all(f.done() for f in futures)
        assert [f.result().output[0] for f in futures] == list(range(20))


def test_closing_without_draining_fails_waiting_queries_and_answers_running_ones():
    with held() as (s, gate, first):
        waiting = s.submit(x(1))
        threading.Timer(0.02, gate.opened.set).start()
        s.close(drain=False)
        assert first.result(0).output == (0.0, 0)
        with pytest.raises(errors.ServerClosedError, match="closed without draining"):
            waiting.result(0)


def test_leaving_the_context_on_an_exception_fails_the_waiting_queries():
    gate, waiting = Gate(), []

    def interrupted():
        with serve(fake(gate)) as s:
            s.submit(x(0))
            assert gate.entered.wait(WAIT_S)
            waiting.append(s.submit(x(1)))
            threading.Timer(0.02, gate.opened.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with pytest.raises(errors.ServerClosedError):
        waiting[0].result(0)


def test_a_closed_server_refuses_and_closes_again():
    s = serve()
    threads = [threading.Thread(target=s.close) for _ in range(3)]
    for t in threads:
        t.start()
    s.close()
    for t in threads:
        t.join(WAIT_S)
        assert not t.is_alive()
    with pytest.raises(errors.ServerClosedError, match="takes no queries; open a new one"):
        s.submit(x(1))
    assert s.health()["closed"]


def test_closing_with_a_timeout_abandons_stuck_workers_and_fails_every_query_left():
    with held() as (s, _, first):
        waiting = s.submit(x(1))
        s.close(timeout_s=0.01)
        assert s.health()["abandoned"] == 1
        for f in (first, waiting):
            with pytest.raises(errors.ServerClosedError, match=r"after 0\.01 s"):
                f.result(0)


def test_a_callback_may_close_its_own_server():
    with held() as (s, gate, first):
        first.add_done_callback(lambda f: s.close())
        waiting = s.submit(x(1))
        gate.opened.set()
        assert waiting.result(WAIT_S).output == (1.0, 0)


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
    assert running.result(WAIT_S).output == (0.0, 0)


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
