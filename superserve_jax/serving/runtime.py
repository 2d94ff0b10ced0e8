"""Settings of the Python process while a server is open, and its behaviour at exit and in forks. No jax.

`low_latency` changes settings that decide tail latency, and restores them later. Measured on a server with 32 workers:
- A garbage collection over a million live objects stops every thread for 50 ms. With Python's own thresholds, a burst of
  70,000 new objects starts one. So a backlog made itself worse: hundreds of collections in 5 s, and none found any garbage.
- Beside one busy thread, the default switch interval of 5 ms lowered SLO attainment from 1.0 to 0.76.

A short switch interval costs CPU time if many threads want to run, since each wakes up once per interval. With a thousand
threads that block in `Future.result`, a query costs a third more than at 2 ms. `await` and `submit_many` need no such threads.

Frozen objects are never collected. So a server that is dropped as part of a reference cycle would keep its threads and its
device's memory. `collect_frozen` frees it when the process has been idle for a minute.
"""

import atexit
import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from superserve_jax import errors

SWITCH_INTERVAL_S = 1e-4
GC_THRESHOLDS = 20_000, 20, 100  # see `gc.set_threshold`
IDLE_S = 60.0  # frozen objects are collected when no server has been used for so long
COLLECTING_SHARE = 1e-3  # collections take at most this share of the time, so hardly any query comes during one

process_id = os.getpid()
"""The id of this process, also in a fork. A variable, since `os.getpid` is a system call."""

# Module variables, since the settings belong to the process. An RLock, since a thread that holds it may run a finalizer which
# opens or closes a server. That nested block then finds another user, and changes no setting.
_lock = threading.RLock()
_users = 0
_unfreeze = False
_switch_interval_s = 0.0
_gc_thresholds = (0, 0, 0)
_collecting = threading.Lock()  # held while frozen objects are collected
_collecting_took_s = 0.0  # how long that took the last time
_next_collection_s = 0.0  # not before this time


@contextlib.contextmanager
def low_latency() -> Iterator[None]:
    """Inside the block, garbage collections skip all present objects and are rarer, and threads take turns every 0.1 ms.

    Entering collects garbage once and then freezes the rest (`gc.freeze`). Several blocks may be open at once, in any order:
    each entry freezes again, and the last exit restores the settings that the first entry found. Objects that were frozen
    before stay frozen. If collections were off, or even rarer, that setting stays. An open server uses this, unless
    `tune_runtime=False`.

    >>> before = sys.getswitchinterval()
    >>> with low_latency():
    ...     gc.get_freeze_count() > 0, round(sys.getswitchinterval(), 6)
    (True, 0.0001)
    >>> sys.getswitchinterval() == before
    True
    """
    global _users, _unfreeze, _switch_interval_s, _gc_thresholds
    entered_in = process_id
    with _lock:
        _users += 1
        if _users == 1:
            _unfreeze = gc.get_freeze_count() == 0
            _switch_interval_s = sys.getswitchinterval()
            _gc_thresholds = gc.get_threshold()
            if _gc_thresholds[0]:  # 0 turns collections off
                gc.set_threshold(*map(max, _gc_thresholds, GC_THRESHOLDS))
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        _postpone_collection()
    try:
        gc.collect()  # without the lock: it runs finalizers, and another thread may wait for the lock in one
        gc.freeze()
        yield
    finally:
        with _lock:
            if process_id == entered_in:  # a fork has restored the settings already
                if _users == 1:
                    _restore()
                _users -= 1


def collection_is_due(*, used: bool) -> bool:
    """Whether it is time to call `collect_frozen`. Every server asks again and again.

    Args:
      used: whether the asking server had work since it asked last.
    """
    with _lock:
        due = not used and _users > 0 and _unfreeze and time.monotonic() >= _next_collection_s
        if used or due:
            _postpone_collection()
        return due


def collect_frozen() -> None:
    """Collects garbage, also among frozen objects, and freezes the rest again.

    This stops all threads for 20 to 130 ms in a process with jax, and longer with more objects.
    """
    global _collecting_took_s
    if not _collecting.acquire(blocking=False):
        return
    try:
        start_s = time.monotonic()
        with _lock:
            if not (_users and _unfreeze):
                return  # the last server was closed meanwhile, so whatever is frozen now is not ours
            gc.unfreeze()
        gc.collect()  # without `_lock`, as above
        with _lock:
            if _users:
                gc.freeze()
            _collecting_took_s = time.monotonic() - start_s
            _postpone_collection()
    finally:
        _collecting.release()


def wait_for_collection(timeout_s: float) -> None:
    """Waits while frozen objects are collected. The interpreter might crash if it exits in a destructor of jax."""
    if _collecting.acquire(timeout=timeout_s):
        _collecting.release()


def _postpone_collection() -> None:
    global _next_collection_s
    _next_collection_s = time.monotonic() + max(IDLE_S, _collecting_took_s / COLLECTING_SHARE)


def _restore() -> None:
    sys.setswitchinterval(_switch_interval_s)
    gc.set_threshold(*_gc_thresholds)
    if _unfreeze:
        gc.unfreeze()


def _begin_fork() -> None:
    """A fork has no open server yet, and no thread that would release a lock."""
    global process_id, _lock, _users, _collecting
    process_id, _lock, _collecting = os.getpid(), threading.RLock(), threading.Lock()
    if _users:
        _users = 0
        _restore()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_begin_fork)


class ProcessTies:
    """Changes the process's settings for a server, and registers a call at exit. `release` undoes both.

    Args:
      at_exit: called before the interpreter exits. It must end the daemon threads, since one that still runs then can crash
        the interpreter.
      tune_runtime: whether `low_latency` is active until `release`.
    """

    def __init__(self, at_exit: Callable[[], object], *, tune_runtime: bool):
        self._process_id, self._at_exit = process_id, at_exit
        self._runtime = contextlib.ExitStack()
        if tune_runtime:
            self._runtime.enter_context(low_latency())
        atexit.register(at_exit)

    def is_fork(self) -> bool:
        """Whether this process is a fork. A fork has the server's memory but no threads, and its locks may be held forever."""
        return process_id != self._process_id

    def refuse_fork(self) -> None:
        """Raises ServerClosedError in a fork."""
        if process_id != self._process_id:
            raise errors.ServerClosedError(
                f"the server belongs to process {self._process_id}, this is its fork {process_id}, which has none of its "
                "threads; open the server after forking, or submit in the process that opened it"
            )

    def release(self) -> None:
        """Restores the settings of the process, and unregisters the call at exit."""
        self._runtime.close()
        atexit.unregister(self._at_exit)
