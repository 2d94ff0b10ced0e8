"""The earliest-deadline-first queue of the server and of the simulator, and how a decision's batch is taken from it. No jax.

With one SLO, arrivals come in the order of their deadlines and the queue is a plain FIFO. Only an item whose deadline
precedes that of the last FIFO item goes to a list that is kept sorted; taking merges the two. A heap would take and add items
faster still, but could not say how many of them are due by some time without looking at all of those (`due_by`).

Items that cannot be met any more may be put behind all the others (`DeadlineQueue.defer`). In an overload, strict order serves
every query a little too late; whoever lets the lost ones wait meets as many as there is throughput for.
"""

import bisect
import collections
import heapq
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile, Row

# (deadline_s, arrival number, floor, item); arrival numbers differ, so comparing two entries never reaches the item.
Entry = tuple[float, int, float, Any]
_deadline_s = operator.itemgetter(0)


def _latest_first(entry: Entry) -> tuple[float, int]:
    return -entry[0], -entry[1]


class DeadlineQueue:
    """Items in the order of their deadlines, ties in the order of arrival; behind them those that were deferred. Not
    thread-safe: the caller holds a lock.

    A floor is the least accuracy that an item accepts; 0 accepts any.

    >>> q = DeadlineQueue()
    >>> q.push(2.0, "late")
    >>> q.push(1.0, "early", floor=0.75)
    >>> q.push(2.0, "later")
    >>> len(q), q.head_deadline_s, q.head(), q.head_floors(2)
    (3, 1.0, 'early', (0.75, 0.0))
    >>> q.pop(3, accuracy=0.7)
    []
    >>> q.defer(2.0), q.late, q.head()
    (1, 1, 'late')
    >>> q.pop(2), q.drain()
    (['late', 'later'], ['early'])
    """

    __slots__ = ("_deferred", "_early", "_fifo", "_floored", "pushed")

    head_length = 0  # inputs have one shape; see `padding.LengthQueue`
    unit = 1.0  # variance over mean of `pushed`, if arrivals are independent: it counts items
    work_ms = 1.0  # what `pushed` counts for one item like the head

    def __init__(self):
        self._fifo: collections.deque[Entry] = collections.deque()  # deadlines ascend
        self._early: list[Entry] = []  # deadlines descend, so that the earliest is taken from the end
        self._deferred: collections.deque[Entry] = collections.deque()
        self.pushed = 0  # items, since the beginning
        self._floored = 0  # waiting items with a floor

    def __len__(self) -> int:
        return len(self._fifo) + len(self._early) + len(self._deferred)

    def tokens(self, more: Sequence[int] = ()) -> int:
        """Tokens of the items and of more; only `padding.LengthQueue` has any."""
        return 0

    def look(self, now_s: float) -> None:
        """Tells the queue the time before it is asked for a batch; only `padding.LengthQueue` needs to know."""

    @property
    def riders(self) -> int:
        """Number of items that could be in the next batch."""
        return len(self._fifo) + len(self._early) + len(self._deferred)

    @property
    def late(self) -> int:
        """Number of deferred items."""
        return len(self._deferred)

    @property
    def late_deadline_s(self) -> float:
        """The deadline of the first deferred item; inf where there is none."""
        return self._deferred[0][0] if self._deferred else math.inf

    def push(self, deadline_s: float, item: Any, floor: float = 0.0, length: int = 0) -> None:
        """Adds an item. O(1) where its deadline is the last, else a search and a move of pointers: 3 us among 9,000. Only
        `padding.LengthQueue` heeds its length."""
        self.pushed += 1
        fifo = self._fifo
        if not fifo or deadline_s >= fifo[-1][0]:
            fifo.append((deadline_s, self.pushed, floor, item))
        else:
            bisect.insort(self._early, (deadline_s, self.pushed, floor, item), key=_latest_first)
        if floor > 0:
            self._floored += 1

    def push_all(self, deadline_s: float, items: Sequence[Any], floor: float = 0.0, lengths: Sequence[int] = ()) -> None:
        """Adds items that share a deadline and a floor: a fifth of the cost of pushing them one by one where that deadline is
        the last. Only `padding.LengthQueue` heeds their lengths."""
        fifo = self._fifo
        if fifo and deadline_s < fifo[-1][0]:
            for item in items:
                self.push(deadline_s, item, floor)
            return
        number = itertools.count(self.pushed + 1)
        fifo.extend(zip(itertools.repeat(deadline_s), number, itertools.repeat(floor), items))
        self.pushed += len(items)
        if floor > 0:
            self._floored += len(items)

    def pop(self, n: int, accuracy: float = math.inf) -> list[Any]:
        """Takes up to `n` items of the earliest deadlines, stopping before the first whose floor exceeds `accuracy`."""
        fifo = self._fifo
        if not self._early and not self._floored and (len(fifo) >= n or not self._deferred):
            return [fifo.popleft()[3] for _ in range(min(n, len(fifo)))]
        items = []
        while len(items) < n and (head := self._head()) is not None and head[2] <= accuracy:
            self._drop_head()
            if head[2] > 0:
                self._floored -= 1
            items.append(head[3])
        return items

    def defer(self, before_s: float) -> int:
        """Puts the items whose deadlines are earlier behind all others, where they stay; returns how many it moved."""
        before = len(self._deferred)
        while (self._fifo or self._early) and (head := self._head()) is not None and head[0] < before_s:
            self._drop_head()
            self._deferred.append(head)
        return len(self._deferred) - before

    def set_aside(self, before_s: float) -> Any:
        """Takes out the items whose deadlines are earlier, but for the deferred; what it returns is for `put_back`."""
        entries = []
        while (self._fifo or self._early) and (head := self._head()) is not None and head[0] < before_s:
            self._drop_head()
            entries.append(head)
        return entries

    def put_back(self, aside: Any) -> None:
        """Puts back what `set_aside` has taken out, before anything else has been added."""
        self._fifo.extendleft(reversed(aside))

    def drop_late(self, done: Callable[[Any], bool]) -> None:
        """Drops from the front of the deferred items those that are `done`. O(1) but for those."""
        while self._deferred and done(self._deferred[0][3]):
            self._floored -= self._deferred.popleft()[2] > 0

    def sweep(self, done: Callable[[Any], bool]) -> None:
        """Drops all items that are `done`. O(n)."""
        for entries in (self._fifo, self._early, self._deferred):
            kept = [entry for entry in entries if not done(entry[3])]
            entries.clear()
            entries.extend(kept)
        if self._floored:
            self._floored = sum(e[2] > 0 for e in itertools.chain(self._fifo, self._early, self._deferred))

    def pop_before(self, before_s: float) -> list[Any]:
        """Takes every item whose deadline is earlier, deferred or not."""
        self.defer(before_s)
        taken = [entry for entry in self._deferred if entry[0] < before_s]
        if taken:
            self._deferred = collections.deque(entry for entry in self._deferred if entry[0] >= before_s)
            self._floored -= sum(entry[2] > 0 for entry in taken)
        return [entry[3] for entry in taken]

    def pop_above(self, accuracy: float) -> list[Any]:
        """Takes every item whose floor exceeds `accuracy`."""
        if not self._floored:
            return []
        taken = [e for entries in (self._fifo, self._early, self._deferred) for e in entries if e[2] > accuracy]
        if taken:
            self._fifo = collections.deque(e for e in self._fifo if e[2] <= accuracy)
            self._early = [e for e in self._early if e[2] <= accuracy]
            self._deferred = collections.deque(e for e in self._deferred if e[2] <= accuracy)
            self._floored -= len(taken)
        return [e[3] for e in taken]

    def retime(self, profile: Profile) -> None:
        """Counts work by another profile from now on; only `padding.LengthQueue` counts anything but items."""

    def due_by(self, time_s: float) -> int:
        """Number of items with deadlines up to a time, the deferred ones left out. O(log n)."""
        fifo, early = self._fifo, self._early
        count = len(fifo) if fifo and fifo[-1][0] <= time_s else bisect.bisect_right(fifo, time_s, key=_deadline_s)
        return count + len(early) - bisect.bisect_left(early, (-time_s,), key=_latest_first) if early else count

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
        entries = itertools.chain(heapq.merge(self._fifo, reversed(self._early)), self._deferred)
        return tuple(entry[2] for entry in itertools.islice(entries, n))

    def items(self) -> list[Any]:
        """Every item, left in place, in no order."""
        return [entry[3] for entry in itertools.chain(self._fifo, self._early, self._deferred)]

    def drain(self) -> list[Any]:
        """Takes every item."""
        return self.pop(len(self))

    def _head(self) -> Entry | None:
        if self._early and (not self._fifo or self._early[-1] < self._fifo[0]):
            return self._early[-1]
        return self._fifo[0] if self._fifo else self._deferred[0] if self._deferred else None

    def _drop_head(self) -> None:
        if self._early and (not self._fifo or self._early[-1] < self._fifo[0]):
            self._early.pop()
        else:
            (self._fifo or self._deferred).popleft()


def take(
    queue: DeadlineQueue, profile: Profile, row: Row, batch: int, *, slack_ms: float, defer_before_s: float = -math.inf
) -> tuple[Row, list[Any]]:
    """The batch of a decision, and the row that will run it: the decided one unless the head asks for more accuracy.

    Items with deadlines before `defer_before_s` first step back. Deferred ones come in only where no others are left.
    The batch is cut before the first item whose floor the decided subnet does not reach. Where that item is the head itself,
    the fastest subnet that reaches it steps in, with the largest batch up to `batch` that fits into `slack_ms` (all of
    `batch` where none does), so that a policy which looks at no floors still makes progress.

    Raises ProfileError where no subnet of the profile reaches the head's floor; the server refuses such a query on arrival.
    """
    if defer_before_s > -math.inf:
        queue.defer(defer_before_s)
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
