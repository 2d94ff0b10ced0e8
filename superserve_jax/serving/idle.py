"""`IdleWorkers`: wakes workers that wait for work, one at a time. No jax."""

import threading
from typing import Any


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
