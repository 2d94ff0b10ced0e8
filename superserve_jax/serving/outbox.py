"""`Outbox`: calls that a thread makes after it has released the pool's lock. No jax."""

import collections
import threading
from collections.abc import Callable
from typing import Any

from superserve_jax.serving.futures import Query


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
        # Taken under the lock, so that no thread which holds the lock still has a reference to an entry.
        with self._lock:
            entries, self.entries = self.entries, collections.deque()
        try:
            while entries:
                call, argument = entries.popleft()
                if call is not None:
                    call(argument)
        finally:
            if entries:  # a KeyboardInterrupt came; the next `empty`, in any thread, makes the other calls
                with self._lock:
                    self.entries.extendleft(reversed(entries))
