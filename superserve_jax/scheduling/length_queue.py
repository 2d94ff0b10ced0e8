"""The queue of a text server: one queue for each length bucket, seen as one. No jax.

An executable has one shape, so a batch is padded to one of a few lengths, the **length buckets**. The longest query of a batch
determines the time of the batch. Example: one long query among fifteen short ones makes all sixteen slow. In strict order of
deadlines nearly every large batch of a mix contains a long query. So `LengthQueue` batches queries of one length bucket:

    the queue      chooses the head, and fills the batch with queries that fit into the head's length bucket
    the policy     sees the profile at the head's length bucket; it counts queries as multiples of the head's work
    the engine     runs the program of the head's length bucket
"""

# ruff: noqa: D102 - the docstring of `queue` describes the methods of every queue in one table

import bisect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from superserve_jax.profile import Profile
from superserve_jax.scheduling.queue import DeadlineQueue


class LengthQueue:
    """One `DeadlineQueue` for each length bucket, seen as one queue.

    **Head.** The earliest deadline of all; of equal deadlines, the longest length. It determines the batch's length bucket.

    **Batch.** The earliest deadlines of the head's length bucket. If these do not fill the batch, shorter queries do, the
    nearest length bucket first. Longer queries wait until one of them is the head.

    **Deferred queries** come last, as in `DeadlineQueue`. If their length bucket is the head's or a shorter one, they fill the
    head's batch. Deferred queries of a longer length bucket get their own batch. The earliest one becomes the head. The batch
    takes queries of the same length bucket first, then shorter ones. It stays small enough that on-time queries still meet
    their deadlines. `late` counts only deferred queries that are eligible. The other ones are no reason for a policy to hurry.

    **Work** of a query is the time that a worker needs for the query at the highest throughput of the fastest subnet.

    >>> from superserve_jax.profile import Row
    >>> from superserve_jax.subnet import Subnet
    >>> rows_at = {length: (Row(Subnet((1,)), 0.7, (ms,)),) for length, ms in ((32, 1.0), (128, 4.0))}
    >>> q = LengthQueue(Profile((1,), rows_at=rows_at))
    >>> for deadline_s, item, length in (1.0, "short", 20), (2.0, "long", 99), (3.0, "brief", 30):
    ...     q.push(deadline_s, item, length=length)
    >>> q.head_length, len(q), q.eligible, q.due_by(9.0), q.pop(3)
    (32, 3, 2, 6.0, ['short', 'brief'])
    >>> q.head_length, q.due_by(9.0), q.pop(3)
    (128, 1.0, ['long'])
    """

    __slots__ = ("_alone_s", "_head", "_lengths", "_limit", "_now_s", "_profile", "_queues", "_work_ms")

    def __init__(self, profile: Profile):
        self._lengths = profile.lengths
        self._now_s = -math.inf
        self._limit = sys.maxsize  # limit on the next batch
        self._queues = tuple(DeadlineQueue() for _ in profile.lengths)
        self._head: int | None = None  # index of the head's length bucket; None if it must be computed again
        self.retime(profile)

    def retime(self, profile: Profile) -> None:
        """The profile has the same length buckets."""
        self._profile, self._head = profile, None
        self._work_ms = tuple(1e3 / t.throughput_qps(t.rows[0].subnet) for t in profile.each_length)
        alone_ms = [t.fastest().latency_ms[0] for t in profile.each_length]
        self._alone_s = tuple(1e-3 * (ms - alone_ms[0]) for ms in alone_ms)

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def tokens(self, more: Sequence[int] = ()) -> int:
        """Number of tokens of all items and of items with the lengths `more`, each padded to its length bucket."""
        waiting = sum(len(q) * length for q, length in zip(self._queues, self._lengths, strict=True))
        return waiting + sum(self._lengths[bisect.bisect_left(self._lengths, length)] for length in more)

    def choose_head(self, now_s: float) -> int:
        """The size of a batch of deferred items depends on `now_s`."""
        self._now_s = now_s
        if any(q.late for q in self._queues):
            self._head = None
        return self.head_length

    @property
    def late(self) -> int:
        """Number of deferred items that are eligible."""
        return sum(q.late for q in self._queues[: self._head_bucket() + 1])

    @property
    def pushed(self) -> float:
        """Work of all items since the beginning, in milliseconds of a worker."""
        return sum(q.pushed * ms for q, ms in zip(self._queues, self._work_ms, strict=True))

    @property
    def dispersion(self) -> float:
        """Sum of squared work / sum of work, in milliseconds: variance over mean of a compound Poisson process."""
        return sum(q.pushed * ms**2 for q, ms in zip(self._queues, self._work_ms, strict=True)) / (self.pushed or 1.0)

    @property
    def head_work(self) -> float:
        """Work of one query of the head's length bucket, in milliseconds of a worker."""
        return self._work_ms[self._head_bucket()]

    @property
    def head_length(self) -> int:
        """The head's length bucket. Only defined while the queue has items."""
        return self._lengths[self._head_bucket()]

    @property
    def eligible(self) -> int:
        """Number of items that could be in the head's batch. Fewer if the head is deferred, to keep on-time items in time."""
        return min(sum(map(len, self._queues[: self._head_bucket() + 1])), self._limit)

    @property
    def head_deadline_s(self) -> float:
        """The head's deadline; infinite if the queue is empty."""
        return self._queues[self._head_bucket()].head_deadline_s

    def head(self) -> Any:
        return self._queues[self._head_bucket()].head()

    def push(self, deadline_s: float, item: Any, floor: float = 0.0, length: int = 0) -> None:
        """Add an item of `length` tokens. An unknown length, 0, belongs to the longest length bucket."""
        self._head = None
        self._queues[bisect.bisect_left(self._lengths, length) if length else -1].push(deadline_s, item, floor)

    def push_all(self, deadline_s: float, items: Sequence[Any], floor: float = 0.0, lengths: Sequence[int] = ()) -> None:
        """Add items that share a deadline and a floor, each with its own length."""
        for item, length in zip(items, lengths, strict=True):
            self.push(deadline_s, item, floor, length)

    def pop(self, n: int, accuracy: float = math.inf) -> list[Any]:
        """Take up to `n` eligible items. In each length bucket, stop before the first floor above `accuracy`.

        If the head's own floor is above `accuracy`, take none.
        """
        items: list[Any] = []
        for q, _, count in self._shares(n):
            items += q.pop(min(count, n - len(items)), accuracy)
            if not items:  # the first share begins with the head
                break
        self._head = None
        return items

    def head_floors(self, n: int) -> tuple[float, ...]:
        if not any(q.head_floors(1) for q in self._queues):  # no item has a floor
            return ()
        floors: tuple[float, ...] = ()
        for q, start, count in self._shares(n):
            count = min(count, n - len(floors))
            floors += q.head_floors(start + count)[start:] or (0.0,) * count
        return floors if any(floors) else ()

    def defer(self, before_s: float) -> int:
        """Length buckets shorter than the head's do not take part: their batches take less time."""
        moved = sum(q.defer(before_s) for q in self._queues[self._head_bucket() :])
        self._head = None
        return moved

    def set_aside(self, before_s: float) -> Any:
        """It uses the same length buckets as `defer`."""
        aside = [(q, q.set_aside(before_s)) for q in self._queues[self._head_bucket() :]]
        self._head = None
        return aside

    def put_back(self, aside: Any) -> None:
        for q, entries in aside:
            q.put_back(entries)
        self._head = None

    def drop_late(self, done: Callable[[Any], bool]) -> None:
        self._head = None
        for q in self._queues:
            q.drop_late(done)

    def sweep(self, done: Callable[[Any], bool]) -> None:
        self._head = None
        for q in self._queues:
            q.sweep(done)

    def pop_before(self, before_s: float) -> list[Any]:
        """Take every item with a deadline before a limit, deferred or not.

        The limit is `before_s` for the shortest length bucket. For a longer one it is later, by the additional latency of one
        query on the fastest subnet.
        """
        self._head = None
        taken = []
        for q, extra_s in zip(self._queues, self._alone_s, strict=True):
            taken += q.pop_before(before_s + extra_s)
        return taken

    def pop_above(self, accuracy: float) -> list[Any]:
        self._head = None
        return [item for q in self._queues for item in q.pop_above(accuracy)]

    def due_by(self, time_s: float) -> float:
        """A query counts as its work / the work of the head."""
        return sum(q.due_by(time_s) * ms for q, ms in zip(self._queues, self._work_ms, strict=True)) / self.head_work

    def items(self) -> list[Any]:
        return [item for q in self._queues for item in q.items()]

    def drain(self) -> list[Any]:
        self._head = None
        return [item for q in self._queues for item in q.drain()]

    def _head_bucket(self) -> int:
        """Index of the head's length bucket. On-time items come before deferred ones, and ties go to the longest."""
        if self._head is None:
            self._limit = sys.maxsize
            bucket, earliest_s, late = len(self._queues) - 1, math.inf, True
            for i, q in enumerate(self._queues):
                on_time, deadline_s = len(q) > q.late, q.head_deadline_s
                if (on_time and late) or (on_time != late and deadline_s <= earliest_s):
                    bucket, earliest_s, late = i, deadline_s, not on_time
            self._head = bucket if late else self._deferred_first(bucket, earliest_s)
        return self._head

    def _deferred_first(self, bucket: int, deadline_s: float) -> int:
        """Index of a longer length bucket whose deferred items run in the next batch, before the on-time head at `bucket`.

        Returns `bucket` if no longer one has deferred items, or if the on-time head could not wait for a batch of them.
        """
        for i in sorted(range(bucket + 1, len(self._queues)), key=lambda i: self._queues[i].late_deadline_s):
            q, on_time = self._queues[i], sum(len(q) - q.late for q in self._queues[: i + 1])
            if not q.late or on_time >= self._profile.max_batch:
                continue
            # On-time queries run next, perhaps on the same worker. More arrive meanwhile: assume a full batch.
            then_ms = self._profile.each_length[bucket].fastest().latency_ms[-1]
            first = self._profile.each_length[i].fastest((*q.head_floors(1), 0.0)[0])
            sizes = zip(self._profile.batch_sizes, first.latency_ms, strict=True)
            if fitting := [n for n, ms in sizes if self._now_s + 1e-3 * (ms + then_ms) <= deadline_s]:
                self._limit = fitting[-1]
                return i
        return bucket

    def _shares(self, n: int) -> Iterator[tuple[DeadlineQueue, int, int]]:
        """The parts of a batch of `n` items, in order. A part is (queue, index of its first item, largest number of items).

        Deferred items come last. Exception: if the head is deferred, the deferred items of its length bucket come first.
        """
        head, *shorter = eligible = self._queues[self._head_bucket() :: -1]
        late_head = len(head) == head.late
        if n > 0 and late_head:
            yield head, 0, head.late
            n -= head.late
        for q in eligible:
            if n > 0 and (count := len(q) - q.late):
                yield q, 0, count
                n -= count
        for q in shorter if late_head else eligible:
            if n > 0 and q.late:
                yield q, len(q) - q.late, q.late
                n -= q.late


Queue = DeadlineQueue | LengthQueue
"""The docstring of `queue` describes what both can do."""


def make_queue(profile: Profile) -> Queue:
    """An empty queue for this profile: a `LengthQueue` if it has several length buckets, else a `DeadlineQueue`."""
    return LengthQueue(profile) if len(profile.lengths) > 1 else DeadlineQueue()
