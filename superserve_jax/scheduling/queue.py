"""Queues in the order of deadlines: what every queue does, and `DeadlineQueue` for inputs of one shape. No jax.

`length_queue.LengthQueue` is the other queue, for several length buckets. The type `length_queue.Queue` means either of them.
Server and simulator use both. The caller holds a lock.

An item is any object: a query in the server, a number in the simulator. `push` takes an item with its deadline, its floor
(the lowest accepted accuracy, 0 accepts any) and its length in tokens (0 if unknown).

The **head** is the first item of the next batch. An item is **eligible** if it could be in the head's batch. **Work** is
measured in queries if inputs have one shape, else in milliseconds of a worker.

    pushed            work of all items since the beginning
    dispersion        variance / mean of the work that arrives per second, if arrivals are independent
    head_work         work of one item like the head
    head_length       length bucket of the head, 0 if inputs have one shape; undefined if the queue is empty
    head_deadline_s   deadline of the head; infinite if the queue is empty
    eligible, late    number of eligible items, and how many of them are deferred

    choose_head       choose the head of a batch that starts at `now_s`, and return `head_length`
    push, push_all    add one item; add items that share a deadline and a floor
    pop               take up to `n` eligible items, the head first; stop at a floor above `accuracy`
    defer             move items with deadlines before `before_s` behind all others, for good; return their number
    set_aside         take out the items that `defer` would move, and return them for `put_back`
    put_back          put the result of `set_aside` back. No item may be added between the two calls
    drop_late         drop items that are `done` (cancelled or answered) from the front of the deferred items
    sweep             drop all items that are `done`, in O(n)
    pop_before        take every item with a deadline before `before_s`, deferred or not
    pop_above         take every item whose floor exceeds `accuracy`
    due_by            work of the items with deadlines up to `time_s`, without deferred ones / work of the head
    head              the head, left in place; None if the queue is empty
    head_floors       floors of the first `n` items in the order of `pop`; `()` if no item has a floor
    items, drain      all items: `items` leaves them in the queue, `drain` takes them
    retime            measure work by another profile from now on, also for items pushed before

With one SLO, arrivals come in the order of their deadlines, and `DeadlineQueue` is a plain FIFO. An item that
is due before the last item of the FIFO goes to a second, sorted list. `pop` merges the two. A heap would be a little faster.
But it would have to visit all items to count the items that are due by some time (`due_by`).

Items whose deadlines cannot be met any more may be deferred: they go behind all others (`defer`). In strict order an overload
makes every query a little too late. With deferral the workers meet as many deadlines as their throughput allows.
"""

# ruff: noqa: D102 - the docstring above describes the methods of every queue in one table

import bisect
import collections
import heapq
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from superserve_jax.profile import Profile

# (deadline_s, arrival number, floor, item). Arrival numbers differ, so comparing two entries never reaches the item.
Entry = tuple[float, int, float, Any]
_deadline_s = operator.itemgetter(0)


def _latest_first(entry: Entry) -> tuple[float, int]:
    return -entry[0], -entry[1]


class DeadlineQueue:
    """A queue for inputs of one shape. Items with equal deadlines keep the order of arrival.

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

    head_length, dispersion, head_work = 0, 1.0, 1.0

    def __init__(self):
        self._fifo: collections.deque[Entry] = collections.deque()  # deadlines ascend
        self._early: list[Entry] = []  # deadlines descend, so that the earliest is taken from the end
        self._deferred: collections.deque[Entry] = collections.deque()
        self.pushed = 0  # items since the beginning
        self._floored = 0  # waiting items with a floor

    def __len__(self) -> int:
        return len(self._fifo) + len(self._early) + len(self._deferred)

    def choose_head(self, now_s: float) -> int:
        return 0

    eligible = property(__len__, doc="Number of all items, since every item could be in the next batch.")

    @property
    def late(self) -> int:
        """Number of deferred items."""
        return len(self._deferred)

    @property
    def late_deadline_s(self) -> float:
        """The deadline of the first deferred item; infinite if there is none."""
        return self._deferred[0][0] if self._deferred else math.inf

    def push(self, deadline_s: float, item: Any, floor: float = 0.0, length: int = 0) -> None:
        """Add an item. O(1) if its deadline is the latest, else an insertion into a sorted list: 3 us among 9,000 items."""
        self.pushed += 1
        fifo = self._fifo
        if not fifo or deadline_s >= fifo[-1][0]:
            fifo.append((deadline_s, self.pushed, floor, item))
        else:
            bisect.insort(self._early, (deadline_s, self.pushed, floor, item), key=_latest_first)
        if floor > 0:
            self._floored += 1

    def push_all(self, deadline_s: float, items: Sequence[Any], floor: float = 0.0, lengths: Sequence[int] = ()) -> None:
        """Add items. If their deadline is the latest, this takes a fifth of the time of pushing them one by one."""
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
        """Take up to `n` items in the order of deadlines. Stop before the first item whose floor exceeds `accuracy`."""
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
        moved = self.set_aside(before_s)
        self._deferred.extend(moved)
        return len(moved)

    def set_aside(self, before_s: float) -> list[Entry]:
        entries = []
        while (self._fifo or self._early) and (head := self._head()) is not None and head[0] < before_s:
            self._drop_head()
            entries.append(head)
        return entries

    def put_back(self, aside: list[Entry]) -> None:
        self._fifo.extendleft(reversed(aside))

    def drop_late(self, done: Callable[[Any], bool]) -> None:
        while self._deferred and done(self._deferred[0][3]):
            self._floored -= self._deferred.popleft()[2] > 0

    def sweep(self, done: Callable[[Any], bool]) -> None:
        for entries in (self._fifo, self._early, self._deferred):
            kept = [entry for entry in entries if not done(entry[3])]
            entries.clear()
            entries.extend(kept)
        if self._floored:
            self._floored = sum(e[2] > 0 for e in itertools.chain(self._fifo, self._early, self._deferred))

    def pop_before(self, before_s: float) -> list[Any]:
        self.defer(before_s)
        taken = [entry for entry in self._deferred if entry[0] < before_s]
        if taken:
            self._deferred = collections.deque(entry for entry in self._deferred if entry[0] >= before_s)
            self._floored -= sum(entry[2] > 0 for entry in taken)
        return [entry[3] for entry in taken]

    def pop_above(self, accuracy: float) -> list[Any]:
        taken: list[Entry] = []
        for entries in (self._fifo, self._early, self._deferred) if self._floored else ():
            taken += [entry for entry in entries if entry[2] > accuracy]
            kept = [entry for entry in entries if entry[2] <= accuracy]
            entries.clear()
            entries.extend(kept)
        self._floored -= len(taken)
        return [entry[3] for entry in taken]

    def retime(self, profile: Profile) -> None:
        """Work is a number of items here, whatever the profile."""

    def due_by(self, time_s: float) -> int:
        """O(log n)."""
        fifo, early = self._fifo, self._early
        count = len(fifo) if fifo and fifo[-1][0] <= time_s else bisect.bisect_right(fifo, time_s, key=_deadline_s)
        return count + len(early) - bisect.bisect_left(early, (-time_s,), key=_latest_first) if early else count

    def head(self) -> Any:
        """The earliest deadline, deferred items last."""
        entry = self._head()
        return None if entry is None else entry[3]

    @property
    def head_deadline_s(self) -> float:
        """The deadline of the head; infinite if the queue is empty."""
        entry = self._head()
        return math.inf if entry is None else entry[0]

    def head_floors(self, n: int) -> tuple[float, ...]:
        if not self._floored:
            return ()
        entries = itertools.chain(heapq.merge(self._fifo, reversed(self._early)), self._deferred)
        return tuple(entry[2] for entry in itertools.islice(entries, n))

    def items(self) -> list[Any]:
        return [entry[3] for entry in itertools.chain(self._fifo, self._early, self._deferred)]

    def drain(self) -> list[Any]:
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
