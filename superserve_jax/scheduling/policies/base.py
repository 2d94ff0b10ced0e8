"""What a policy is asked (`State`), what it answers (`Decision`), and the latency table that policies share. No jax.

A policy is asked with the profile of the free worker. With length buckets it is the profile at the head's length bucket, and
the counts in the state are in units of queries like the head. For a worker that runs slower than its profile, all times and
rates are scaled, as if time ran faster (see `speeds`).
"""

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from superserve_jax.profile import Profile
from superserve_jax.subnet import Subnet


class State(NamedTuple):
    """What a policy may know when a worker is free and at least one query waits.

    Args:
      now_s: the time.
      slack_ms: time left until the head's deadline, which is the earliest; negative if it has passed.
      waiting: number of waiting queries, at least 1. With length buckets, without queries longer than the head's length
      bucket.
      floors: the lowest accuracy that each of the next queries accepts, in the queue's order, up to the largest batch. Empty
        if no waiting query has a floor.
      workers: number of live workers, with the asking one. If speeds differ: total speed / speed of the asking worker.
      last_subnet: the subnet that the asking worker ran last, None at first.
      late: how many of `waiting` were deferred (`Decision.defer_ms`).
      rate_qps: recent mean number of arrivals per second; 0 while unknown (see `arrivals.ArrivalMeter`).
      variance_qps: its variance per second, equal to the rate for a Poisson process. With length buckets a query counts here,
        in `rate_qps` and in `near` as its work / the work of a query like the head (see `length_queue.LengthQueue`).
      slo_ms: the shortest SLO of the queries of the last one or two seconds; infinite while unknown.
      near: how many waiting queries are due within max(2 * slack, shortest SLO); None if not counted.
      worker: number of the asking worker, from 0.
    """

    now_s: float
    slack_ms: float
    waiting: int
    floors: tuple[float, ...] = ()
    workers: float = 1
    last_subnet: Subnet | None = None
    late: int = 0
    rate_qps: float = 0.0
    variance_qps: float = 0.0
    slo_ms: float = math.inf
    near: float | None = None
    worker: int = 0


class Decision(NamedTuple):
    """Run up to `batch` of the earliest deadlines on `subnet`.

    Args:
      subnet: a subnet of the profile.
      batch: the largest number of queries, at least 1.
      defer_ms: before the batch is taken, queries with less slack than this go behind all others, for good. By default none.
      reason: a word for the server's counters, one of `REASONS` or your own.
    """

    subnet: Subnet
    batch: int
    defer_ms: float = -math.inf
    reason: str = ""


REASONS = {
    "best": "the most accurate subnet: there is time for it",
    "slack": "the most accurate subnet that fits into the time",
    "late": "the fastest subnet, because late queries wait",
    "risk": "the fastest subnet, because a burst could make others late",
    "guard": "the fastest subnet: there is no time for another",
    "short": "the fastest subnet and fewer queries: otherwise the first would be late",
    "lost": "no choice saves the first query",
    "floor": "the first query asks for more accuracy than the policy's choice has",
}
"""Why the policies of this package decided as they did. `dispatch` itself gives the reason "floor"."""


Policy = Callable[[Profile, State], Decision]
"""`policy(profile, state) -> Decision`, a pure function. Any callable will do. The policies of this package are built for one
profile, keep tables of it, and ignore the profile that they are passed."""


_NEIGHBOURS = 9  # number of cells with similar latencies whose spreads are combined


class Table:
    """Latencies of the Pareto-optimal subnets, ascending along both axes, so that a bisection finds every choice.

    A subnet is named by its rank in accuracy, a batch by its index in `sizes`.

    Attributes:
      sizes: the batch sizes.
      subnets, accuracies: by rank.
      rows: median latencies of each subnet.
      columns: median latencies at each batch size.
      tails: smoothed 99th percentiles at each batch size. A percentile of some tens of calls is close to their maximum, so one
        disturbance decides it. Therefore tail = median latency * median of the ratios p99 / median over the nine cells with
        the most similar latencies.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> table = Table(paper_profile())
    >>> table.most_accurate(size=4, budget_ms=12.0), table.largest_batch(rank=5, budget_ms=12.0)
    (1, 2)
    """

    def __init__(self, profile: Profile):
        rows = profile.pareto().monotone().rows
        self.sizes = profile.batch_sizes
        self.subnets = tuple(r.subnet for r in rows)
        self.accuracies = tuple(r.accuracy for r in rows)
        self.rows = tuple(r.latency_ms for r in rows)
        self.columns = tuple(zip(*self.rows, strict=True))
        spread = _spreads([cell for r in rows for cell in zip(r.latency_ms, r.p99_ms, strict=True)])
        self.tails = tuple(tuple(itertools.accumulate((ms * spread[ms] for ms in column), max)) for column in self.columns)

    def most_accurate(self, size: int, budget_ms: float) -> int:
        """Rank of the most accurate subnet that runs this batch within the budget, -1 if there is none."""
        return bisect.bisect_right(self.columns[size], budget_ms) - 1

    def largest_batch(self, rank: int, budget_ms: float) -> int:
        """Index of the largest batch that this subnet runs within the budget, -1 if there is none."""
        return bisect.bisect_right(self.rows[rank], budget_ms) - 1

    def above(self, floor: float) -> int:
        """Rank of the least accurate subnet that reaches a floor, or of the most accurate subnet if none does."""
        return min(bisect.bisect_left(self.accuracies, floor), len(self.accuracies) - 1)


def _spreads(cells: Sequence[tuple[float, float]]) -> dict[float, float]:
    """From each median latency to its ratio p99 / median, smoothed. Cells are (median, p99)."""
    ordered = sorted(cells)
    spreads = [p99 / ms for ms, p99 in ordered]
    window = min(_NEIGHBOURS, len(spreads))
    starts = (min(max(i - window // 2, 0), len(spreads) - window) for i in range(len(spreads)))
    return {ms: statistics.median(spreads[i : i + window]) for (ms, _), i in zip(ordered, starts, strict=True)}
