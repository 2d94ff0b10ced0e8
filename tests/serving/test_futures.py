"""Futures: how they resolve, and how threads and event loops wait for them."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import sys
import threading

import pytest
from fakes import WAIT_S, threads, wait_until

from superserve_jax.serving.futures import Future

OUTCOMES = {
    "a result": lambda f: f.set_result(1),
    "an error": lambda f: f.set_exception(ValueError("no")),
    "a cancellation": lambda f: f.cancel(),
}
outcomes = pytest.mark.parametrize("resolve", OUTCOMES.values(), ids=OUTCOMES)


def callbacks_of(future):
    [callbacks] = [held for held in gc.get_referents(future) if isinstance(held, list)]
    return callbacks


def later(fn) -> threading.Timer:
    timer = threading.Timer(0.02, fn)
    timer.start()
    return timer


@outcomes
def test_the_first_outcome_stays(resolve):
    future = Future()
    assert not future.done()
    assert resolve(future)
    assert future.done()
    before = repr(future)
    assert not future.set_result(2)
    assert not future.set_exception(KeyError())
    assert future.cancel() == future.cancelled()
    assert repr(future) == before


def test_a_result_is_returned_to_every_thread_that_waits():
    future, results = Future(), []
    with threads(*[lambda: results.append(future.result(WAIT_S))] * 4):
        later(lambda: future.set_result(7))
    assert results == [7] * 4
    assert future.exception() is None


def test_an_error_is_raised_by_result_and_returned_by_exception():
    future, error = Future(), ValueError("no")
    future.set_exception(error)
    with pytest.raises(ValueError, match="no"):
        future.result()
    assert future.exception() is error


def test_waiting_too_long_raises_timeout_error_with_the_remedy_and_leaves_the_future_pending():
    future = Future()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.001 s; wait longer, or cancel\(\)"):
        future.result(timeout=0.001)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0)
    assert future.set_result(1)
    assert future.result(timeout=0) == 1


def test_a_cancelled_future_raises_cancelled_error_and_cancels_twice():
    future = Future()
    assert future.cancel()
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception()


@outcomes
def test_callbacks_run_once_in_order_whether_added_before_or_after(resolve):
    future, calls = Future(), []
    future.add_done_callback(lambda f: calls.append((1, f)))
    future.add_done_callback(lambda f: calls.append((2, f)))
    assert calls == []
    resolve(future)
    future.add_done_callback(lambda f: calls.append((3, f)))
    resolve(future)
    assert calls == [(1, future), (2, future), (3, future)]


def test_a_callback_that_raises_is_logged_and_the_next_still_runs(caplog):
    future, calls = Future(), []
    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(calls.append)
    assert future.set_result(1)
    assert calls == [future]
    assert "a done-callback of <Future answered> raised" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_await_returns_the_result_or_raises_the_error_that_another_thread_sets():
    async def main():
        pending = [Future() for _ in range(3)]
        for i, f in enumerate(pending):
            later(lambda i=i, f=f: f.set_result(i))
        assert await asyncio.gather(*pending) == [0, 1, 2]
        assert await pending[0] == 0
        failing = Future()
        later(lambda: failing.set_exception(ValueError("no")))
        with pytest.raises(ValueError, match="no"):
            await failing

    asyncio.run(main())


def test_a_cancelled_await_cancels_the_query():
    async def main():
        future = Future()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.001)
        assert future.cancelled()

    asyncio.run(main())


def test_an_answer_after_the_awaiting_loop_has_closed_does_no_harm(caplog):
    gc.collect()  # or asyncio may report tasks here that earlier tests left pending
    caplog.clear()
    future = Future()

    async def wait(started):
        started.set()
        await future

    async def main():
        started = asyncio.Event()
        task = asyncio.create_task(wait(started))
        await started.wait()
        return task

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(main())
    loop.close()
    assert future.set_result(1)
    assert not [r for r in caplog.records if r.name.startswith(("superserve_jax", "asyncio"))]
    loop.set_exception_handler(lambda *_: None)  # asyncio would report, rightly, that this test leaves the task pending
    del task
    gc.collect()


def test_repeated_timeouts_leave_no_callbacks_behind():
    future = Future()
    future.add_done_callback(print)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            future.result(timeout=0)
    assert callbacks_of(future) == [print]


def test_a_client_that_waits_is_woken_before_a_slow_callback():
    future, answered, in_time = Future(), threading.Event(), []
    future.add_done_callback(lambda f: in_time.append(answered.wait(WAIT_S)))
    with threads(lambda: (future.result(WAIT_S), answered.set())):
        wait_until(lambda: len(callbacks_of(future)) == 2)
        future.set_result(1)
    assert in_time == [True]


def test_a_finalizer_may_cancel_one_query_while_another_of_the_same_submit_resolves():
    lock = threading.RLock()
    first, second = Future(lock), Future(lock)
    with lock:
        assert second.cancel()
        assert first.set_result(1)


def test_an_event_loop_is_woken_once_for_all_queries_that_resolve_meanwhile():
    async def main():
        loop, pending = asyncio.get_running_loop(), [Future() for _ in range(50)]
        tasks = [asyncio.ensure_future(wait(f)) for f in pending]
        await asyncio.sleep(0)  # each awaits its future
        wake_ups, wake_up = [], loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (wake_ups.append(1), wake_up(*args))
        with threads(lambda: [f.set_result(i) for i, f in enumerate(pending)]):
            pass  # the loop stands still meanwhile
        assert await asyncio.gather(*tasks) == list(range(50))
        assert len(wake_ups) == 1

    async def wait(future):
        return await future

    asyncio.run(main())


def test_of_many_threads_that_resolve_a_future_one_succeeds_and_each_callback_runs_once():
    rounds, kinds = 300, 3
    begin, end = threading.Barrier(2 * kinds + 2), threading.Barrier(2 * kinds + 2)
    shared, won, called, seen = [None], [], [], []
    ids = itertools.count()

    def in_each_round(act):
        for _ in range(rounds):
            begin.wait(WAIT_S)
            act(shared[0])
            end.wait(WAIT_S)

    def listen(future):
        name = next(ids)
        future.add_done_callback(lambda f: called.append(name))
        with contextlib.suppress(concurrent.futures.CancelledError):
            future.exception(WAIT_S)
        seen.append(future.done())

    acts = [
        lambda future: won.append(future.set_result(1)),
        lambda future: won.append(future.set_exception(ValueError())),
        lambda future: won.append(future.cancel() and "cancelled"),
    ]
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with threads(*(functools.partial(in_each_round, act) for act in (*acts, *acts, listen))):
        for turn in range(rounds):
            shared[0] = Future()
            begin.wait(WAIT_S)
            end.wait(WAIT_S)
            results = won[turn * 2 * kinds :]
            assert results.count(True) == (0 if shared[0].cancelled() else 1)
            assert results.count("cancelled") == (2 if shared[0].cancelled() else 0)
    sys.setswitchinterval(before_s)
    assert len(called) == len(set(called)) == rounds
    assert all(seen)
