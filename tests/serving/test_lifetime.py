"""How long things live: servers and workers that come and go leave no thread, setting, engine or memory behind.

One file because each test compares the process before with the process after.
"""

import concurrent.futures
import contextlib
import dis
import functools
import gc
import itertools
import sys
import threading
import time
import weakref

import pytest
from bad import no_new_threads, within
from fakes import (
    PROFILE,
    SUBNETS,
    WAIT_S,
    Gate,
    always,
    fail,
    fake,
    held,
    outcomes,
    serve,
    several,
    threads,
    wait_until,
    worker,
    x,
)

from superserve_jax import errors
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving import futures


def settings():
    return sys.getswitchinterval(), gc.get_threshold(), gc.get_freeze_count() > 0


OTHERS = weakref.WeakSet()  # threads that earlier tests of this process left, which may end at any moment


def own_threads():
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("superserve") and t not in OTHERS)


@pytest.fixture(autouse=True, scope="module")
def note_other_threads():
    OTHERS.update(threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = settings()
    with within(300):
        yield
        wait_until(lambda: (settings(), own_threads()) == (before, []))


# -- a system without threads -------------------------------------------------------------------------------------------------


def test_a_worker_whose_thread_does_not_start_leaves_the_server_as_it_was():
    with held() as (s, _, first):
        waiting = s.submit(x(1), min_accuracy=0.75)
        engine = fake(name="new")
        reference, before = weakref.ref(engine), s.health()
        less_accurate = PROFILE.only([PROFILE.rows[0].subnet])
        with no_new_threads(), pytest.raises(errors.ThreadStartError, match="raise the limit"):
            s.add_worker(engine, profile=less_accurate)
        del engine
        assert reference() is None
        after = s.health()
        for health in (before, after):
            health["per_worker"][0].pop("running_s")
        assert after == before
        assert not waiting.done()
        assert s.add_worker(fake(name="new")) == "new"
        assert outcomes([waiting]) == [1]
        assert not first.done()


@pytest.mark.parametrize("started", range(4))
def test_a_server_whose_threads_do_not_start_is_undone(started):
    engines = several(3)
    references = [weakref.ref(engine) for engine in engines]
    before = settings()
    with no_new_threads(after=started), pytest.raises(errors.ThreadStartError):
        serve(*engines, tune_runtime=True)
    del engines
    assert (settings(), own_threads()) == (before, [])
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize("drain", [True, False])
def test_a_server_closes_although_no_thread_starts(drain):
    with held() as (s, gate, first):
        waiting = s.submit(x(1))
        with no_new_threads():
            gate.opened.set()
            s.close(drain=drain, timeout_s=WAIT_S)
            assert outcomes([first]) == [0]
        error = waiting.exception(WAIT_S)  # without a thread for callbacks, the watchdog waits until it can start one
        assert error is None or (isinstance(error, errors.ServerClosedError) and not drain)


def test_a_deferred_close_happens_when_threads_start_again():
    def policy(profile, state):
        if not asked:
            asked.append(state)
            s.close()
        return Decision(SUBNETS[0], 1)

    asked = []
    s = serve(policy=policy, stall_s=0.1)
    with no_new_threads():
        assert outcomes(s.submit_many(x(range(3)))) == [0, 1, 2]
        time.sleep(0.1)
        assert own_threads() != []
    wait_until(lambda: own_threads() == [])


# -- done-callbacks that close ------------------------------------------------------------------------------------------------


def in_a_worker(s, gate, first, close):
    first.add_done_callback(close)
    gate.opened.set()


def in_cancel(s, gate, first, close):
    waiting = s.submit(x(1))
    waiting.add_done_callback(close)
    threading.Timer(0.05, gate.opened.set).start()
    waiting.cancel()


def in_submit(s, gate, first, close):
    waiting = s.submit(x(1))
    waiting.add_done_callback(close)
    threading.Timer(0.05, gate.opened.set).start()
    with s.pool.lock:
        s.pool.outbox.fail(waiting, RuntimeError("left by another thread"))
    s.submit(x(2))


def in_close(s, gate, first, close):
    s.submit(x(1)).add_done_callback(close)
    threading.Timer(0.05, gate.opened.set).start()
    s.close(drain=False)


def after_an_abandonment(s, gate, first, close):
    first.add_done_callback(close)  # the engine is stuck, so the watchdog gives the query up
    wait_until(first.done)
    gate.opened.set()


@pytest.mark.parametrize("how", [{}, {"drain": False}, {"timeout_s": WAIT_S}], ids=str)
@pytest.mark.parametrize("where", [in_a_worker, in_cancel, in_submit, in_close, after_an_abandonment])
def test_a_server_closed_in_a_done_callback_leaves_nothing(where, how):
    before, gate, closed = settings(), Gate(), threading.Event()
    s = serve(fake(gate), tune_runtime=True, stall_s=0.2 if where is after_an_abandonment else WAIT_S, max_tries=1)

    def close(_):
        s.close(**how)
        closed.set()

    first = s.submit(x(0))
    assert gate.entered.wait(WAIT_S)
    assert settings() != before
    where(s, gate, first, close)
    assert closed.wait(WAIT_S)
    wait_until(lambda: (settings(), own_threads()) == (before, []))
    assert s.health()["closed"]


@pytest.mark.parametrize("name", ["add_done_callback", "second callback", "result", "cancel"])
def test_a_signal_handler_may_close_the_server_while_its_thread_is_in_a_future(name):
    """Python runs signal handlers after these instructions only."""
    places = ("CALL", "RESUME", "JUMP_BACKWARD")

    def trace(frame, event, arg):
        if frame.f_code.co_filename != futures.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if before.get(frame, "").startswith(places):
                left[0] -= 1
                if left[0] == 0:
                    sys.settrace(None)
                    gate.opened.set()
                    s.close()
            before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        return trace

    tried, outer = 0, sys.gettrace()
    left = [0]
    while left[0] <= 0:
        tried += 1
        before, left = {}, [tried]
        with held() as (s, gate, first):
            if name == "second callback":
                first.add_done_callback(print)
            act = {"cancel": first.cancel, "result": first.exception}
            threading.Timer(0.1, gate.opened.set).start()
            with contextlib.suppress(concurrent.futures.CancelledError):
                sys.settrace(trace)
                try:
                    act.get(name, lambda: first.add_done_callback(lambda _: None))()
                finally:
                    sys.settrace(outer)
    assert tried >= 3


# -- close in time ------------------------------------------------------------------------------------------------------------


def in_answers(s, gates, block):
    """Every worker blocks in the done-callback of an answer."""
    for gate in gates:
        gate.opened.set()
    wait_until(lambda: all(w["state"] == "answering" for w in s.health()["per_worker"]))


def in_failures(s, gates, block):
    """Every worker blocks in the done-callback of a query that failed."""
    for gate in gates:
        gate.then = fail
        gate.opened.set()
    wait_until(lambda: s.health()["failures"] == len(gates))


def in_the_watchdog(s, gates, block):
    """The engines hang. The watchdog gives the first batches up."""
    wait_until(lambda: s.health()["alive"] == 0)


def nowhere_yet(s, gates, block):
    """The engines hang, and nobody has given them up."""


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("where", [in_answers, in_failures, in_the_watchdog, nowhere_yet])
def test_close_returns_in_time_wherever_done_callbacks_block(where, drain):
    count = 24  # so many that waiting for each in turn takes much longer than the limit
    release, gates = threading.Event(), [Gate() for _ in range(count)]
    engines = [fake(gate, name=f"fake:{i}") for i, gate in enumerate(gates)]
    stall_s = 0.2 if where is in_the_watchdog else WAIT_S
    s = serve(*engines, policy=always(0, 1), max_failures=1, max_tries=1, stall_s=stall_s)
    try:
        queries = [s.submit(x(i)) for i in range(count)]
        for gate in gates:
            assert gate.entered.wait(WAIT_S)
        queries += s.submit_many(x(range(count, 5 * count)))
        for future in queries:
            future.add_done_callback(lambda _: release.wait(WAIT_S))
        where(s, gates, release)
        start_s = time.monotonic()
        s.close(drain=drain, timeout_s=0.3)
        assert time.monotonic() - start_s < 0.3 * count / 2
        with threads(lambda: s.close(timeout_s=0.1)):  # again, at the same time
            s.close(timeout_s=0.1)
    finally:
        release.set()
        for gate in gates:
            gate.opened.set()
    wait_until(lambda: all(future.done() for future in queries))


class Blocking:
    """An object whose finalizer blocks."""

    def __init__(self, release):
        self.release = release

    def __del__(self):
        self.release.wait(WAIT_S)


def test_close_returns_in_time_although_a_finalizer_blocks():
    release = threading.Event()
    try:
        with held() as (s, _, first):
            waiting = s.submit(x(1))
            waiting.add_done_callback(functools.partial(lambda blocking, _: None, Blocking(release)))
            del waiting  # now the server has the last reference
            start_s = time.monotonic()
            s.close(drain=False, timeout_s=0.3)
            assert time.monotonic() - start_s < WAIT_S / 2  # the finalizer blocks for twice as long
            assert first.done()
    finally:
        release.set()


# -- workers that come and go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["one name", "many names"])
def test_a_thousand_workers_that_came_and_went_leave_nothing(same):
    def objects():
        gc.collect()
        return len(gc.get_objects())

    def come_and_go(count):
        for _ in range(count):
            profile = PROFILE.scaled(1.0 + next(number) / 1000)  # each has its own policy
            s.remove_worker(s.add_worker(fake(name="extra" if same else f"extra:{next(number)}"), profile=profile))

    number = itertools.count(1)
    with serve(policy="slackfit") as s:
        come_and_go(300)  # more than are remembered
        before = objects()
        come_and_go(700)
        assert objects() < before + 350
        health = s.health()
        assert (health["alive"], health["joined"], health["workers"]) == (1, 1001, 2 if same else 18)
        assert len(health["per_worker"]) == health["workers"]
        assert outcomes([s.submit(x(1))]) == [1]


def test_a_worker_that_failed_is_remembered_longer_than_removed_ones():
    with serve(max_failures=1) as s:
        s.add_worker(fake(fail, name="broken"))
        while worker(s, "broken")["state"] != "left":
            outcomes(s.submit_many(x(range(20))))
        for i in range(40):
            s.remove_worker(s.add_worker(fake(name=f"extra:{i}")))
        names = [w["name"] for w in s.health()["per_worker"]]
        assert names == ["fake:0", "broken", *(f"extra:{i}" for i in range(24, 40))]
        assert "the device burns" in worker(s, "broken")["last_error"]
