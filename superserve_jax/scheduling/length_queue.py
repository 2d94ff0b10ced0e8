"""Length buckets: what a server of sequences knows about their lengths. No jax.

A batch is padded to one of a few lengths, the **length buckets**, since an executable has one shape. What it costs goes with
the longest sequence in it, so one long query among fifteen short ones makes all sixteen pay, and in strict order of the
deadlines nearly every large batch has one. Hence `LengthQueue`: it lets queries ride with others of their own length bucket.

    the queue      says which length bucket the head is in, and fills the head's batch with queries that are no longer
    the policy     sees the profile at that length bucket, and counts of what waits and comes in units of the head's work
    the engine     runs the program of the length bucket that holds the inputs it is given, which is that one
"""

import bisect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from superserve_jax.profile import Profile
from superserve_jax.scheduling import queue
from superserve_jax.scheduling.queue import DeadlineQueue


def make_queue(profile: Profile) -> DeadlineQueue:
    """An empty queue for a server with this profile: a plain one, unless there are several length buckets."""
    return LengthQueue(profile) if len(profile.lengths) > 1 else DeadlineQueue()


class LengthQueue(DeadlineQueue):
    """One queue for each length bucket, seen as one. Not thread-safe: the caller holds a lock.

    The **head** is the earliest deadline of all; of equal ones, the longest. Its length bucket is that of the next batch. The
    batch takes the earliest deadlines of this length bucket, and where those do not fill it, of the shorter ones, the nearest
    length first, which ride in what would be padding. Longer ones are passed over: they have a batch of their own as soon as
    one of them is the head, which is for the next free worker.

    Deferred items come in where the others do not fill a batch, as in the plain queue. Those of the head's length bucket and
    of shorter ones ride in its batch. Those of a longer one need a batch of that length: the first of them becomes the head,
    and its batch is full of its like before any others ride in it, but no larger than lets the others be served after it in
    time (`look`). A policy is told of those late ones that can be in the batch: of others it need not make haste.

    In strict order instead a batch pays for the longest of its queries, and in a mix nearly every large batch has a long one.

    Two numbers stand for work, `pushed` and `due_by`: in them a query counts for what it costs a worker at the highest
    throughput of the fastest subnet.

    >>> from superserve_jax.profile import Row
    >>> from superserve_jax.subnet import Subnet
    >>> rows_at = {length: (Row(Subnet((1,)), 0.7, (ms,)),) for length, ms in ((32, 1.0), (128, 4.0))}
    >>> q = LengthQueue(Profile((1,), rows_at=rows_at))
    >>> for deadline_s, item, length in (1.0, "short", 20), (2.0, "long", 99), (3.0, "brief", 30):
    ...     q.push(deadline_s, item, length=length)
    >>> q.head_length, len(q), q.riders, q.due_by(9.0), q.pop(3)
    (32, 3, 2, 6.0, ['short', 'brief'])
    >>> q.head_length, q.due_by(9.0), q.pop(3)
    (128, 1.0, ['long'])
    """

    __slots__ = ("_alone_s", "_lengths", "_now_s", "_place", "_profile", "_queues", "_seats", "_work_ms")

    def __init__(self, profile: Profile):
        self._lengths = profile.lengths
        self._now_s = -math.inf
        self._seats = sys.maxsize  # in the next batch
        self._queues = tuple(DeadlineQueue() for _ in profile.lengths)
        self._place: int | None = None  # of the head's length bucket, once it has been looked for
        self.retime(profile)

    def retime(self, profile: Profile) -> None:
        """Counts work by another profile, with the same length buckets, from now on; also what has been pushed before."""
        self._profile, self._place = profile, None
        self._work_ms = tuple(1e3 / t.throughput_qps(t.rows[0].subnet) for t in profile.each_length)
        alone_ms = [queue.fastest(t).latency_ms[0] for t in profile.each_length]
        self._alone_s = tuple(1e-3 * (ms - alone_ms[0]) for ms in alone_ms)

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def tokens(self, more: Sequence[int] = ()) -> int:
        """Tokens of all items, and of more of such lengths, each padded to its length bucket."""
        waiting = sum(len(q) * length for q, length in zip(self._queues, self._lengths, strict=True))
        return waiting + sum(self._lengths[bisect.bisect_left(self._lengths, length)] for length in more)

    def look(self, now_s: float) -> None:
        """Tells it the time, from which it knows how large a batch of deferred items the others can wait for."""
        self._now_s = now_s
        if any(q.late for q in self._queues):
            self._place = None

    @property
    def late(self) -> int:
        """Number of deferred items that could be in the head's batch."""
        return sum(q.late for q in self._queues[: self._head_place() + 1])

    @property
    def pushed(self) -> float:  # type: ignore[override]
        """Work of all items since the beginning, in milliseconds of a worker."""
        return sum(q.pushed * ms for q, ms in zip(self._queues, self._work_ms, strict=True))

    @property
    def unit(self) -> float:  # type: ignore[override]
        """Variance over mean of `pushed`, if arrivals are independent, in milliseconds: the mean work, weighted by itself."""
        return sum(q.pushed * ms**2 for q, ms in zip(self._queues, self._work_ms, strict=True)) / (self.pushed or 1.0)

    @property
    def work_ms(self) -> float:  # type: ignore[override]
        """Work of one query of the head's length bucket."""
        return self._work_ms[self._head_place()]

    @property
    def head_length(self) -> int:
        """The head's length bucket; only while something waits."""
        return self._lengths[self._head_place()]

    @property
    def riders(self) -> int:
        """Number of items that could be in the head's batch; where that of a late head lets items on time wait, no more than
        it can hold and be in time for them."""
        return min(sum(map(len, self._queues[: self._head_place() + 1])), self._seats)

    @property
    def head_deadline_s(self) -> float:
        """The head's deadline; inf when empty."""
        return self._queues[self._head_place()].head_deadline_s

    def head(self) -> Any:
        """The first item of the next batch, left in place; None when empty."""
        return self._queues[self._head_place()].head()

    def push(self, deadline_s: float, item: Any, floor: float = 0.0, length: int = 0) -> None:
        """Adds an item of so many tokens; 0, where nobody knows, belongs to the longest length bucket."""
        self._place = None
        self._queues[bisect.bisect_left(self._lengths, length) if length else -1].push(deadline_s, item, floor)

    def push_all(self, deadline_s: float, items: Sequence[Any], floor: float = 0.0, lengths: Sequence[int] = ()) -> None:
        """Adds items that share a deadline and a floor, each of its own length."""
        for item, length in zip(items, lengths, strict=True):
            self.push(deadline_s, item, floor, length)

    def pop(self, n: int, accuracy: float = math.inf) -> list[Any]:
        """Takes up to `n` items that may share the head's batch; none where the head's floor exceeds `accuracy`, and of each
        length bucket those before its first floor that does."""
        items: list[Any] = []
        for q, _, count in self._shares(n):
            items += q.pop(min(count, n - len(items)), accuracy)
            if not items:  # the first share begins with the head
                break
        self._place = None
        return items

    def head_floors(self, n: int) -> tuple[float, ...]:
        """The floors of the first `n` items in the order in which `pop` takes them; `()` where none of them has a floor."""
        if not any(q.head_floors(1) for q in self._queues):  # none of them has one
            return ()
        floors: tuple[float, ...] = ()
        for q, start, count in self._shares(n):
            count = min(count, n - len(floors))
            floors += q.head_floors(start + count)[start:] or (0.0,) * count
        return floors if any(floors) else ()

    def defer(self, before_s: float) -> int:
        """Puts the items of the head's length bucket and of longer ones whose deadlines are earlier behind all others, where
        they stay; returns how many it moved. What is too late for the head may do for a shorter one."""
        moved = sum(q.defer(before_s) for q in self._queues[self._head_place() :])
        self._place = None
        return moved

    def set_aside(self, before_s: float) -> Any:
        """Takes out the items of the head's length bucket and of longer ones whose deadlines are earlier, as `defer` would."""
        aside = [(q, q.set_aside(before_s)) for q in self._queues[self._head_place() :]]
        self._place = None
        return aside

    def put_back(self, aside: Any) -> None:
        """See `DeadlineQueue.put_back`."""
        for q, entries in aside:
            q.put_back(entries)
        self._place = None

    def drop_late(self, done: Callable[[Any], bool]) -> None:
        """See `DeadlineQueue.drop_late`."""
        self._place = None
        for q in self._queues:
            q.drop_late(done)

    def sweep(self, done: Callable[[Any], bool]) -> None:
        """See `DeadlineQueue.sweep`."""
        self._place = None
        for q in self._queues:
            q.sweep(done)

    def pop_before(self, before_s: float) -> list[Any]:
        """Takes every item whose deadline is earlier, deferred or not: `before_s` is that of the shortest length bucket, and
        later for the others by what the fastest subnet takes longer for them."""
        self._place = None
        taken = []
        for q, extra_s in zip(self._queues, self._alone_s, strict=True):
            taken += q.pop_before(before_s + extra_s)
        return taken

    def pop_above(self, accuracy: float) -> list[Any]:
        """See `DeadlineQueue.pop_above`."""
        self._place = None
        return [item for q in self._queues for item in q.pop_above(accuracy)]

    def due_by(self, time_s: float) -> float:  # type: ignore[override]
        """Work of the items with deadlines up to a time, but for the deferred, in queries of the head's length bucket."""
        return sum(q.due_by(time_s) * ms for q, ms in zip(self._queues, self._work_ms, strict=True)) / self.work_ms

    def items(self) -> list[Any]:
        """Every item, left in place, in no order."""
        return [item for q in self._queues for item in q.items()]

    def drain(self) -> list[Any]:
        """Takes every item."""
        self._place = None
        return [item for q in self._queues for item in q.drain()]

    def _head_place(self) -> int:
        if self._place is None:
            self._seats = sys.maxsize
            place, earliest_s, late = len(self._queues) - 1, math.inf, True
            for i, q in enumerate(self._queues):
                on_time, deadline_s = len(q) > q.late, q.head_deadline_s
                if (on_time and late) or (on_time != late and deadline_s <= earliest_s):
                    place, earliest_s, late = i, deadline_s, not on_time
            self._place = place if late else self._lost_first(place, earliest_s)
        return self._place

    def _lost_first(self, place: int, deadline_s: float) -> int:
        """The longer length bucket whose deferred items have the next batch, though there are items on time, the earliest of
        which is in `place`; that itself where there is none, or these would have to wait for too long."""
        for i in sorted(range(place + 1, len(self._queues)), key=lambda i: self._queues[i].late_deadline_s):
            q, riding = self._queues[i], self._queues[: i + 1]
            on_time = sum(len(q) - q.late for q in riding)
            if not q.late or on_time >= self._profile.max_batch:
                continue
            # What is on time is served after it, by the same worker if need be, and more of it will have come.
            then_ms = queue.fastest(self._profile.each_length[place]).latency_ms[-1]
            first = queue.fastest(self._profile.each_length[i], (*q.head_floors(1), 0.0)[0])
            sizes = zip(self._profile.batch_sizes, first.latency_ms, strict=True)
            if seats := [n for n, ms in sizes if self._now_s + 1e-3 * (ms + then_ms) <= deadline_s]:
                self._seats = seats[-1]
                return i
        return place

    def _shares(self, n: int) -> Iterator[tuple[DeadlineQueue, int, int]]:
        """The queues that a batch of `n` takes from, in order: from which item on, and how many at most; late ones last, but
        for those of a late head's length bucket."""
        head, *shorter = riding = self._queues[self._head_place() :: -1]
        late_head = len(head) == head.late
        if n > 0 and late_head:
            yield head, 0, head.late
            n -= head.late
        for q in riding:
            if n > 0 and (count := len(q) - q.late):
                yield q, 0, count
                n -= count
        for q in shorter if late_head else riding:
            if n > 0 and q.late:
                yield q, len(q) - q.late, q.late
                n -= q.late
