"""The earliest-deadline-first queue of the server and of the simulator, and how a decision's batch is taken from it. No jax.

With one SLO, arrivals come in the order of their deadlines and the queue is a plain FIFO. Only an item whose deadline
precedes that of the last FIFO item goes to a heap; taking merges the two.
"""

import collections
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile, Row

# (deadline_s, arrival number, floor, item); arrival numbers differ, so comparing two entries never reaches the item.
Entry = tuple[float, int, float, Any]


class DeadlineQueue:
    """Items in the order of their deadlines, ties in the order of arrival. Not thread-safe: the caller holds a lock.

    A floor is the least accuracy that an item accepts; 0 accepts any.

    >>> q = DeadlineQueue()
    >>> q.push(2.0, "late")
    >>> q.push(1.0, "early", floor=0.75)
    >>> q.push(2.0, "later")
    >>> len(q), q.head_deadline_s, q.head(), q.head_floors(2)
    (3, 1.0, 'early', (0.75, 0.0))
    >>> q.pop(3, accuracy=0.7)
    []
    >>> q.pop(2), q.drain()
    (['early', 'late'], ['later'])
    """

    __slots__ = ("_arrivals", "_fifo", "_floored", "_heap")

    def __init__(self):
        self._fifo: collections.deque[Entry] = collections.deque()  # deadlines ascend
        self._heap: list[Entry] = []
        self._arrivals = 0
        self._floored = 0  # waiting items with a floor

    def __len__(self) -> int:
        return len(self._fifo) + len(self._heap)

    def push(self, deadline_s: float, item: Any, floor: float = 0.0) -> None:
        """Adds an item. O(1) where its deadline is the last, else O(log n)."""
        self._arrivals += 1
        fifo = self._fifo
        if not fifo or deadline_s >= fifo[-1][0]:
            fifo.append((deadline_s, self._arrivals, floor, item))
        else:
            heapq.heappush(self._heap, (deadline_s, self._arrivals, floor, item))
        if floor > 0:
            self._floored += 1

    def pop(self, n: int, accuracy: float = math.inf) -> list[Any]:
        """Takes up to `n` items of the earliest deadlines, stopping before the first whose floor exceeds `accuracy`."""
        fifo = self._fifo
        if not self._heap and not self._floored:
            return [fifo.popleft()[3] for _ in range(min(n, len(fifo)))]
        items = []
        while len(items) < n and (head := self._head()) is not None and head[2] <= accuracy:
            if fifo and head is fifo[0]:
                fifo.popleft()
            else:
                heapq.heappop(self._heap)
            if head[2] > 0:
                self._floored -= 1
            items.append(head[3])
        return items

    def head(self) -> Any:
        """The item of the earliest deadline, left in place; None when empty."""
        entry = self._head()
        return None if entry is None else entry[3]

    @property
    def head_deadline_s(self) -> float:
        """The earliest deadline; inf when empty."""
        entry = self._head()
        return math.inf if entry is None else entry[0]

    def head_floors(self, n: int) -> tuple[float, ...]:
        """The floors of the first `n` items in the order they would be taken; `()` where no waiting item has a floor."""
        if not self._floored:
            return ()
        entries = heapq.merge(self._fifo, _ascending(self._heap))
        return tuple(entry[2] for entry in itertools.islice(entries, n))

    def drain(self) -> list[Any]:
        """Takes every item."""
        return self.pop(len(self))

    def _head(self) -> Entry | None:
        if self._heap and (not self._fifo or self._heap[0] < self._fifo[0]):
            return self._heap[0]
        return self._fifo[0] if self._fifo else None


def take(queue: DeadlineQueue, profile: Profile, row: Row, batch: int, *, slack_ms: float) -> tuple[Row, list[Any]]:
    """The batch of a decision, and the row that will run it: the decided one unless the head asks for more accuracy.

    The batch is cut before the first item whose floor the decided subnet does not reach. Where that item is the head itself,
    the fastest subnet that reaches it steps in, with the largest batch up to `batch` that fits into `slack_ms` (all of
    `batch` where none does), so that a policy which looks at no floors still makes progress.

    Raises ProfileError where no subnet of the profile reaches the head's floor; the server refuses such a query on arrival.
    """
    items = queue.pop(batch, row.accuracy)
    if items or not len(queue):
        return row, items
    row = fastest(profile, queue.head_floors(1)[0])
    fitting = [size for size, ms in zip(profile.batch_sizes, row.latency_ms, strict=True) if size <= batch and ms <= slack_ms]
    return row, queue.pop(max(fitting, default=batch), row.accuracy)


def fastest(profile: Profile, floor: float = 0.0) -> Row:
    """The row with the lowest latency at the smallest batch size among those at least as accurate as `floor`."""
    rows = [row for row in profile.rows if row.accuracy >= floor]
    if not rows:
        best = profile.rows[-1].accuracy
        raise errors.ProfileError(f"no subnet is as accurate as {floor}, the best reaches {best}; lower the floor")
    return min(rows, key=lambda row: row.latency_ms[0])


def _ascending(heap: list[Entry]) -> Iterator[Entry]:
    """The entries of a heap in ascending order, found lazily: the first n cost O(n log n), whatever the heap's size."""
    frontier = [(heap[0], 0)] if heap else []
    while frontier:
        entry, i = heapq.heappop(frontier)
        yield entry
        for child in (2 * i + 1, 2 * i + 2):
            if child < len(heap):
                heapq.heappush(frontier, (heap[child], child))
