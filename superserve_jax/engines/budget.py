"""A cache that keeps its values within a byte budget, such as kept slices on a device."""

import collections
import threading
from collections.abc import Callable
from typing import Any


class LeastRecentlyUsed:
    """Keeps values within a byte budget, and drops the least recently used first. `get` makes a dropped value again.

    A value that is larger than the whole budget is kept alone. Threads may share an object; it makes one value at a time. We
    do not use `cachetools.LRUCache`, because it makes a value before it drops others, so that all of them take memory for a
    moment.

    >>> kept = LeastRecentlyUsed(15)
    >>> [kept.get(key, 6, lambda: print("makes", key) or key.upper()) for key in ("a", "b", "a", "c", "a")]
    makes a
    makes b
    makes c
    ['A', 'B', 'A', 'C', 'A']
    >>> kept.nbytes, kept.makes
    (12, 3)

    Attributes:
      budget_bytes: the byte budget.
      nbytes: the bytes of all values that are kept now.
      makes: the number of values that have been made so far.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.makes = 0
        self._lock = threading.Lock()
        self._values: collections.OrderedDict[Any, tuple[int, Any]] = collections.OrderedDict()

    def get(self, key: Any, nbytes: int, make: Callable[[], Any]) -> Any:
        """The value of `key`. If the value is not kept, `make()` makes it; `nbytes` is its size."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                return found[1]
            while self._values and self.nbytes + nbytes > self.budget_bytes:
                self.nbytes -= self._values.popitem(last=False)[1][0]
            value = make()
            self._values[key] = nbytes, value
            self.nbytes += nbytes
            self.makes += 1
            return value

    def clear(self) -> None:
        """Drops all values."""
        with self._lock:
            self._values.clear()
            self.nbytes = 0
