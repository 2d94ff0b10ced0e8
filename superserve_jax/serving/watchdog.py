"""The watchdog thread of a pool: it abandons stuck workers, and makes the calls that had to be deferred. No jax.

A call is deferred if it comes from a signal handler, a finalizer or a policy whose thread holds the pool's lock.
"""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool

_log = logging.getLogger(__name__)


class Watchdog:
    """Sleeps until its bell rings or a period has passed. Then it makes deferred calls and abandons stuck workers.

    Args:
      pool: the pool. The watchdog ends when the pool is closed, its last worker has left and no call is deferred.
      period_s: the longest time between two checks for stuck workers.
    """

    def __init__(self, pool: "Pool", period_s: float):
        self._pool, self._period_s = pool, period_s
        self._deferred: collections.deque[Callable[[], object]] = collections.deque()
        # A plain lock serves as the bell. Releasing it rings; this takes no lock and runs no Python code.
        self._bell = threading.Lock()
        self._bell.acquire()
        self.thread = threading.Thread(target=self._watch, name="superserve-watchdog", daemon=True)

    def ring(self) -> None:
        """Wakes the watchdog. Any thread may call this at any moment."""
        with contextlib.suppress(RuntimeError):  # the bell is ringing already
            self._bell.release()

    def defer(self, work: Callable[[], object]) -> None:
        """Makes the watchdog call `work` soon. Any thread may call this at any moment, even while it holds a lock."""
        self._deferred.append(work)
        self.ring()

    def defer_to_a_thread(self, work: Callable[[], object]) -> None:
        """Like `defer`, for work that may take long: it runs in a thread of its own."""
        self.defer(threading.Thread(target=_logged, args=(work,), name="superserve-deferred", daemon=True).start)

    @property
    def idle(self) -> bool:
        """Whether nothing is deferred."""
        return not self._deferred

    def _watch(self) -> None:
        while not self._pool.ended():
            due_s = time.monotonic() + self._period_s
            self._bell.acquire(timeout=self._period_s)
            while self._deferred:
                _logged(self._deferred.popleft())
            # A wake-up that is more than a period late: the whole process stood still, for example because it was suspended.
            late_s = time.monotonic() - due_s
            self._pool.abandon_stuck(excused_s=late_s if late_s > self._period_s else 0.0)
        self._pool.process.release()


def _logged(work: Callable[[], object]) -> None:
    """Calls `work`, and logs its error, since no caller is left to raise it to."""
    try:
        work()
    except Exception:
        _log.exception("a call that was deferred to another thread failed")
