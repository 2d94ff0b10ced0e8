"""Work in threads: order, settings, and how it ends."""

import signal
import threading
import time

import jax
import pytest

from superserve_jax.engines import keys, threads


def test_results_keep_the_order_and_nested_threads_keep_the_settings():
    def precisions(_):
        return threads.each(lambda _: keys.settings()["jax_default_matmul_precision"], range(3), workers=3)

    with jax.default_matmul_precision("highest"):
        assert threads.each(precisions, range(2), workers=2) == [["highest"] * 3] * 2
    assert threads.each(lambda i: time.sleep(0.01 * (3 - i)) or i, range(4), workers=4, description="numbers") == [0, 1, 2, 3]
    assert threads.each(abs, [], workers=1) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_or_ctrl_c_ends_nested_work(error):
    """Ctrl-C raises in the main thread only, while it waits."""
    begun = []

    def work(_):
        begun.append(threading.current_thread())
        time.sleep(0.01)

    def group(i):
        if error is RuntimeError and i == 1:  # not the first one, for which `each` might wait
            raise error
        threads.each(work, range(500), workers=2)

    def interrupt(*_):
        raise error

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        if error is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(error):
            threads.each(group, range(3), workers=3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(begun) < 500
    assert not any(thread.is_alive() for thread in begun)
    before = len(begun)
    time.sleep(0.05)
    assert len(begun) == before


def test_work_begins_again_after_an_error():
    def fail(_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        threads.each(fail, range(2), workers=2)
    assert threads.each(abs, [-1, 2], workers=2) == [1, 2]


def test_nested_calls_divide_their_number_of_threads():
    most, running, lock = [0], [0], threading.Lock()

    def inner(_):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    threads.each(lambda _: threads.each(inner, range(6), workers=4), range(2), workers=8)
    assert 2 <= most[0] <= 4
