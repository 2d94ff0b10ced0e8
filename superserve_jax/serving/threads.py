"""How the threads of a server wake each other, and leave work to each other. No jax.

`server.py` opens with the map of threads and locks.
"""

import collections
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from superserve_jax import errors, foreign
from superserve_jax.serving import runtime
from superserve_jax.serving.futures import Query

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool

_log = logging.getLogger(__name__)


def start(target: Callable[[], object], name: str) -> threading.Thread:
    """Starts a daemon thread. Raises ThreadStartError if the system cannot."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    with errors.StartingThreads():
        thread.start()
    return thread


def held_here(lock: Any) -> Callable[[], bool]:
    """Returns a function that returns whether the calling thread holds a `threading.RLock`. It runs no Python code.

    `threading.Condition` asks its lock in the same way. Python has no public name for this.

    >>> import threading
    >>> lock = threading.RLock()
    >>> is_held_here = held_here(lock)
    >>> with lock:
    ...     inside = is_held_here()
    >>> inside, is_held_here()
    (True, False)
    """
    return lock._is_owned


class Outbox:
    """Calls of foreign code that wait until no thread holds the lock.

    Failing a query runs its done-callbacks. Dropping the last reference to an object runs its finalizer. So a thread that
    holds the lock leaves both here, and every thread that has released the lock calls `empty`.

    Args:
      lock: the pool's lock.

    >>> outbox, query = Outbox(threading.RLock()), Query(None, 0.0, 1.0, 0.0)
    >>> outbox.fail(query, ValueError("no"))
    >>> outbox.empty()
    >>> query.exception()
    ValueError('no')
    """

    __slots__ = ("_lock", "_thread", "entries")

    def __init__(self, lock: Any):
        self.entries: collections.deque[tuple[Callable[[Any], object] | None, Any]] = collections.deque()
        self._lock = lock
        self._thread = threading.local()

    def fail(self, query: Query, error: BaseException) -> None:
        """Resolves a query to an error later. The caller holds the lock."""
        self.entries.append((query.set_exception, error))

    def drop(self, thing: object) -> None:
        """Keeps an object alive until the outbox is emptied. The caller holds the lock."""
        self.entries.append((None, thing))

    def call(self, fn: Callable[[Any], object], argument: object) -> None:
        """Calls `fn(argument)` later. The caller holds the lock."""
        self.entries.append((fn, argument))

    def never_here(self) -> None:
        """In this thread, `empty` does nothing from now on, since a call could block the thread."""
        self._thread.is_emptying = True

    def empty_within(self, timeout_s: float | None) -> None:
        """Like `empty`, but returns after `timeout_s` even if a call blocks. Another thread then goes on with the calls."""
        if timeout_s is None:
            self.empty()
        elif self.entries:
            with contextlib.suppress(errors.ThreadStartError):  # the watchdog tries again until nothing is left
                start(self.empty, "superserve-callbacks").join(timeout_s)

    def empty(self) -> None:
        """Makes all calls, and drops all objects. The caller does not hold the lock.

        A done-callback that runs here may submit a query, which calls `empty` again. That inner call does nothing; otherwise
        callbacks would nest without a limit. The outer call goes on until nothing is left.
        """
        if getattr(self._thread, "is_emptying", False):
            return
        self._thread.is_emptying = True
        try:
            while self.entries:
                self._empty_once()
        finally:
            self._thread.is_emptying = False

    def _empty_once(self) -> None:
        # An entry leaves the deque only after its call. If Ctrl-C or a signal handler raises in between, the next `empty`, in
        # any thread, makes the call again.
        entries: collections.deque[Any] = collections.deque()
        try:
            with self._lock:  # so no thread that holds the lock still has a reference to an entry
                entries, self.entries = self.entries, entries
            while entries:
                call, argument = entries[0]
                if call is not None:
                    call(argument)
                entries.popleft()
        finally:
            if entries:
                with self._lock:
                    self.entries.extendleft(reversed(entries))


class IdleWorkers:
    """Wakes idle workers one at a time: each one wakes the next. Several at once would only compete for the lock.

    Args:
      lock: the pool's lock. The caller of every method holds it.

    Attributes:
      count: how many workers wait.
    """

    __slots__ = ("_condition", "_waking", "count")

    def __init__(self, lock: Any):
        self._condition = threading.Condition(lock)
        self.count = 0
        self._waking = False  # whether a worker has been woken but does not run yet

    def wait(self) -> None:
        """Waits until this worker is woken. The caller then checks whether there is work."""
        self.count += 1
        self._condition.wait()
        self.count -= 1
        self._waking = False

    def wake_one(self) -> None:
        """Wakes one idle worker, unless one is waking up already."""
        if self.count and not self._waking:
            self._waking = True
            self._condition.notify()

    def wake_all(self) -> None:
        """Wakes every idle worker, for example for a retry that only some of them may run."""
        self._condition.notify_all()


class Watchdog:
    """Sleeps until its bell rings, at most `stall_s` / 4. Then it makes deferred calls, abandons stuck workers, and fails
    queries that have waited too long for a lost worker.

    It also collects frozen garbage while no server of the process is used (see `runtime`).

    Args:
      pool: the pool. The watchdog ends when the pool is closed, its last worker has left, and no call is left to be made.
    """

    def __init__(self, pool: "Pool"):
        self._pool, self._period_s = pool, min(pool.options.stall_s, runtime.IDLE_S) / 4
        self._arrived = 0  # queries until the last round
        self._deferred: collections.deque[Callable[[], object]] = collections.deque()
        # A plain lock serves as the bell. Releasing it rings; this takes no lock and runs no Python code.
        self._bell = threading.Lock()
        self._bell.acquire()
        self.thread = start(self._watch, "superserve-watchdog")

    def ring(self) -> None:
        """Wakes the watchdog. Any thread may call this at any moment."""
        with contextlib.suppress(RuntimeError):  # the bell is ringing already
            self._bell.release()

    def defer(self, work: Callable[[], object]) -> None:
        """Makes the watchdog call `work` soon. Any thread may call this at any moment, even while it holds a lock."""
        self._deferred.append(work)
        self.ring()

    def defer_to_a_thread(self, work: Callable[[], object]) -> None:
        """Like `defer`, but the work runs in a thread of its own, as soon as one can be started. It may take long."""

        def begin() -> None:
            try:
                start(functools.partial(_logged, work), "superserve-deferred")
            except errors.ThreadStartError:
                self._deferred.append(begin)  # for the next round

        self.defer(begin)

    def _watch(self) -> None:
        self._pool.outbox.never_here()
        while not self._pool.ended() or self._deferred or self._pool.outbox.entries:
            due_s = time.monotonic() + self._period_s
            self._bell.acquire(timeout=self._period_s)
            for _ in range(len(self._deferred)):
                _logged(self._deferred.popleft())
            # A wake-up that is more than a period late: the whole process stood still, for example because it was suspended.
            late_s = time.monotonic() - due_s
            self._pool.abandon_stuck(excused_s=late_s if late_s > self._period_s else 0.0)
            self._pool.lost.check()
            self._pool.outbox.empty_within(0.0)
            arrived, self._arrived = self._arrived, self._pool.counters.arrived
            used = arrived != self._arrived or self._pool.idle.count < self._pool.members.alive
            if runtime.collection_is_due(used=used):
                self.defer_to_a_thread(runtime.collect_frozen)
        self._pool.process.release()


def _logged(work: Callable[[], object]) -> None:
    """Calls `work`, and logs its error, since no caller is left to raise it to."""
    try:
        work()
    except BaseException as error:
        foreign.log(_log, logging.ERROR, "a call that was deferred to another thread failed", error=error)
