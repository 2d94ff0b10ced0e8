"""Counters of a server: queries by outcome, batches by subnet, size and reason, and histograms of times. No jax.

Our own counters, since the counters of libraries take a lock each time. These change under the pool's lock when it is held
anyway: when a client submits, and when a worker takes its next batch. A snapshot is consistent: every query that has arrived
waits, runs, or is counted under its outcome.
"""

import bisect
import collections
from collections.abc import Iterable, Sequence
from typing import Any

from superserve_jax.profile import Profile
from superserve_jax.subnet import Subnet

EDGES_S = tuple(float(f"{step}e{power}") for power in range(-4, 1) for step in ("1", "1.6", "2.5", "4", "6.3"))
"""Upper edges of the histograms, in seconds: five per decade, from 0.1 ms to 6.3 s."""


Batch = tuple[Subnet, int, list[float], int, float, float, float, str]
"""An answered batch. A plain tuple, since making a named tuple takes longer than the rest of the counting:

- the subnet, and the number of queries;
- when each query was submitted, without the cancelled queries;
- how many of these were late;
- when the engine began and when it ended;
- the time from the beginning to the first query's deadline;
- the policy's reason (see `policies.Decision`).

All times are in seconds.
"""

MAX_REASONS, _MAX_REASON = 100, 100  # different reasons that are counted, and characters of one
_PENDING = 32  # number of batches that are counted together, in 40 us


class Histogram:
    """Counts times by bucket. The first bucket ends at the first edge, and the last one holds the times above all edges.

    >>> h = Histogram((1.0, 10.0))
    >>> h.add(7.0), h.add_since([20.0, 21.0, 29.5], 30.0, 70.5)
    (None, None)
    >>> h.snapshot()
    {'edges': [1.0, 10.0], 'counts': [1, 3, 0], 'sum': 26.5}
    """

    __slots__ = ("_edges", "counts", "total")

    def __init__(self, edges: Iterable[float]):
        self._edges = (*edges, float("inf"))
        self.counts = [0] * len(self._edges)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Adds one time."""
        self.counts[bisect.bisect_left(self._edges, value)] += 1
        self.total += value

    def add_since(self, starts_s: Sequence[float], end_s: float, sum_s: float) -> None:
        """Adds the time `end_s - start_s` for each of `starts_s`. O(log n) for each bucket that is hit.

        Args:
          starts_s: the start times, at least one, in ascending order.
          end_s: the common end time.
          sum_s: the sum of `starts_s`.
        """
        edges, counts, count = self._edges, self.counts, len(starts_s)
        self.total += count * end_s - sum_s
        bucket, i = bisect.bisect_left(edges, end_s - starts_s[0]), 0
        while bucket and end_s - starts_s[-1] <= edges[bucket - 1]:  # usually all are in one bucket
            shorter = bisect.bisect_left(starts_s, -edges[bucket - 1], i, key=lambda start_s: start_s - end_s)
            counts[bucket] += shorter - i
            bucket, i = bucket - 1, shorter
        counts[bucket] += count - i

    def snapshot(self) -> dict[str, Any]:
        """`edges`: upper edges, inclusive; `counts`, with one more entry for longer times; `sum`: sum of all times."""
        return {"edges": list(self._edges[:-1]), "counts": list(self.counts), "sum": self.total}


class Counters:
    """The counters of one server since it was opened. No counter ever decreases. The caller holds the pool's lock.

    Args:
      profile: the profile of the first worker.

    Attributes:
      arrived: number of submitted queries.
      admitted: number of submitted queries that were not refused.
      expired: number of queries that were dropped because they could no longer meet their deadline.
      failed: number of queries that were answered with another error.
      requeued: how often a query was put back because its batch failed or its worker left.
      ranks: the position of each subnet that may run, as in `snapshot`. It never changes, but is replaced. So it may be read
        without the lock.
      last_end_s: when the last counted batch ended, on the server's clock; None before the first one.
    """

    def __init__(self, profile: Profile):
        self._accuracies: dict[Subnet, float] = {}  # of every subnet that may run
        self.ranks: dict[Subnet, int] = {}
        self.know(profile)
        self._pending: list[Batch] = []
        self.arrived = self.admitted = self.expired = self.failed = self.requeued = self._cancelled = 0
        # For each subnet: number of batches, of answered queries and of late queries among them, and seconds of its batches.
        self._by_subnet: dict[Subnet, list[Any]] = collections.defaultdict(lambda: [0, 0, 0, 0.0])
        self._before = (0, 0)  # answered queries, and late ones, before the last swap
        self._by_size = [0] * (profile.max_batch + 1)
        self._busy_s = [0.0] * (profile.max_batch + 1)  # seconds of the batches of each size
        self.last_end_s: float | None = None
        self._by_reason: dict[str, int] = {}
        self._latency, self._wait, self._slack = Histogram(EDGES_S), Histogram(EDGES_S), Histogram((0.0, *EDGES_S))

    def add(self, batch: Batch) -> None:
        """Adds a batch. It is counted later, since counting many together takes half the time."""
        self._pending.append(batch)
        if len(self._pending) >= _PENDING:
            self._count()

    def swap(self, profiles: Sequence[Profile]) -> None:
        """Starts new counters for the subnets of the new profiles. The counters by outcome go on."""
        self._count()
        self._before = self._answered()
        self._accuracies.clear()
        self._by_subnet.clear()
        self.know(*profiles)

    def know(self, *profiles: Profile) -> None:
        """Adds the subnets of profiles that are new."""
        for profile in profiles:
            self._accuracies |= {row.subnet: row.accuracy for row in profile.rows if row.subnet not in self._accuracies}
        self.ranks = {subnet: rank for rank, subnet in enumerate(self._accuracies)}

    def _answered(self) -> tuple[int, int]:
        answered, late = (sum(counts[i] for counts in self._by_subnet.values()) for i in (1, 2))
        return self._before[0] + answered, self._before[1] + late

    def _count(self) -> None:
        by_subnet, by_size, busy_s, by_reason = self._by_subnet, self._by_size, self._busy_s, self._by_reason
        wait, latency, slack = self._wait.add_since, self._latency.add_since, self._slack.add
        for subnet, size, submitted_s, late, start_s, finish_s, slack_s, reason in self._pending:
            counts = by_subnet[subnet]
            counts[0] += 1
            counts[1] += len(submitted_s)
            counts[2] += late
            counts[3] += finish_s - start_s
            by_size[size] += 1
            busy_s[size] += finish_s - start_s
            if self.last_end_s is None or finish_s > self.last_end_s:
                self.last_end_s = finish_s
            if type(reason) is not str or reason not in by_reason:
                reason = self._new_reason(reason)
            by_reason[reason] = by_reason.get(reason, 0) + 1
            slack(slack_s if slack_s > 0 else 0.0)
            if submitted_s:
                submitted_s.sort()
                sum_s = sum(submitted_s)
                wait(submitted_s, start_s, sum_s)
                latency(submitted_s, finish_s, sum_s)
        self._pending.clear()

    def _new_reason(self, reason: object) -> str:
        """The key under which a new reason counts. "other" for one that is no text, and when a policy gives too many."""
        if isinstance(reason, str) and len(self._by_reason) < MAX_REASONS:
            return "".join(reason[:_MAX_REASON])  # a str, also for a subclass
        return "other"

    def snapshot(self, *, unanswered: int) -> dict[str, Any]:
        """The counted part of `Server.snapshot`.

        Args:
          unanswered: number of queries that wait or run. Queries that are neither unanswered nor counted were cancelled. The
            server notices a cancelled query only when it removes it.
        """
        self._count()
        answered, late = self._answered()
        cancelled = self.admitted - answered - self.expired - self.failed - unanswered
        # An abandoned worker may still answer queries that already wait again. They count as answered and as waiting until
        # another worker takes them.
        self._cancelled = max(self._cancelled, cancelled)
        ran = ((i, accuracy, self._by_subnet[subnet]) for i, (subnet, accuracy) in enumerate(self._accuracies.items()))
        return {
            "queries": {
                "arrived": self.arrived,
                "met": answered - late,
                "late": late,
                "expired": self.expired,
                "failed": self.failed,
                "cancelled": self._cancelled,
                "refused": self.arrived - self.admitted,
                "requeued": self.requeued,
            },
            "subnets": {
                str(i): {
                    "accuracy": accuracy,
                    "batches": counts[0],
                    "met": counts[1] - counts[2],
                    "late": counts[2],
                    "busy_s": counts[3],
                }
                for i, accuracy, counts in ran
                if counts[0]
            },
            "batch_sizes": {str(size): count for size, count in enumerate(self._by_size) if size},
            "batch_busy_s": {str(size): busy_s for size, busy_s in enumerate(self._busy_s) if size},
            "reasons": dict(sorted(self._by_reason.items())),
            "latency_s": self._latency.snapshot(),
            "wait_s": self._wait.snapshot(),
            "slack_s": self._slack.snapshot(),
        }
