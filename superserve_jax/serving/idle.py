"""Where workers wait for work. No jax."""

import threading
from typing import Any


class IdleWorkers:
    """Wakes idle workers one at a time: each one wakes the next. More at once would only fight for the lock.

    Args:
      lock: the pool's. The caller of every method holds it.
    """

    __slots__ = ("_condition", "_count", "_waking")

    def __init__(self, lock: Any):
        self._condition = threading.Condition(lock)
        self._count = 0
        self._waking = False  # a worker has been woken and does not run yet

    def __bool__(self) -> bool:
        return self._count > 0

    def wait(self) -> None:
        """Waits until woken, for work or for another reason."""
        self._count += 1
        self._condition.wait()
        self._count -= 1
        self._waking = False

    def wake_one(self) -> None:
        """Wakes a worker, unless one is on its way."""
        if self._count and not self._waking:
            self._waking = True
            self._condition.notify()

    def wake_all(self) -> None:
        """Wakes every worker, for what is not for all of them."""
        self._condition.notify_all()
