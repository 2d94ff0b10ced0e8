"""The input of a policy (`State`), its output (`Decision`), and the latency table that policies share. No jax.

A policy is called with the profile of the free worker. With length buckets, this is the profile at the head's length bucket.
The counts in the state are then multiples of the head's work. For a worker that runs slower than its profile, all times and
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
    """The input of a policy, when a worker (the asking worker) is free and at least one query waits.

    Args:
      now_s: the present time.
      slack_ms: time left until the head's deadline; negative if it has passed. The head is the first query of the next batch,
        usually the one with the earliest deadline.
      waiting: number of waiting queries, at least 1. Queries that are longer than the head's length bucket do not count.
      floors: the lowest accuracy that each of the next queries accepts, in the queue's order, up to the largest batch. Empty
        if no waiting query has a floor.
      workers: number of live workers, including the asking one. If speeds differ: total speed / speed of the asking worker.
      last_subnet: the subnet that the asking worker ran last, None at first.
      late: how many of `waiting` were deferred (`Decision.defer_ms`).
      rate_qps: recent mean number of arrivals per second; 0 while unknown (see `arrivals.ArrivalMeter`).
      variance_qps: variance of the number of arrivals per second, equal to `rate_qps` for a Poisson process. With length
        buckets, in `rate_qps`, `variance_qps` and `near` a query counts as its work / the head's work (see
        `length_queue.LengthQueue`).
      slo_ms: the shortest SLO of the queries of the last one or two seconds; infinite while unknown.
      near: number of waiting queries, without deferred ones, that are due within max(2 * slack, slo_ms); None if not counted.
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
    """The output of a policy: run up to `batch` queries with the earliest deadlines on `subnet`.

    Args:
      subnet: a subnet of the profile.
      batch: the largest number of queries, at least 1.
      defer_ms: before the batch is taken, queries with less slack than this are deferred: they go behind all others, for
        good. If a faster worker can still save a query, this worker only leaves it (see `dispatch.next_batch`). By default
        no query is deferred.
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
    "risk": "the fastest subnet, because a burst could make other queries late",
    "guard": "the fastest subnet: there is no time for a slower one",
    "short": "the fastest subnet and fewer queries: otherwise the first query would be late",
    "lost": "no choice saves the first query",
    "unplanned": "the fastest subnet, because the planner's solver found no plan (see `Planner`)",
    "floor": "the first query asks for more accuracy than the policy's choice has",
}
"""The reasons that the policies of this package give, explained. `dispatch` gives the reason "floor"."""


Policy = Callable[[Profile, State], Decision]
"""`policy(profile, state) -> Decision`. Any callable will do. The policies here, except `Planner`, are pure functions.
Most are built for one profile, keep tables of it, and ignore the argument `profile`. `ByProfile` selects by this argument."""


_NEIGHBOURS = 9  # a cell is a (subnet, batch size); p99 is smoothed over this many cells with similar latencies


class Table:
    """Latencies of the Pareto-optimal subnets, ascending in accuracy and in batch size, so that bisection finds a choice.

    Methods name a subnet by its rank in accuracy, from 0, and a batch by its index in `sizes`.

    Attributes:
      sizes: the batch sizes.
      subnets, accuracies: the subnets and their accuracies, by rank.
      rows: median latencies of each subnet.
      columns: median latencies at each batch size.
      tails: smoothed 99th percentiles at each batch size. A 99th percentile of some tens of calls is close to their maximum,
        so one disturbance determines it. Therefore tail = median latency * median of the ratios p99 / median over the nine
        (subnet, batch size) with the most similar latencies.

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
        """Rank of the least accurate subnet that reaches a floor. If none does, the rank of the most accurate subnet."""
        return min(bisect.bisect_left(self.accuracies, floor), len(self.accuracies) - 1)


def _spreads(cells: Sequence[tuple[float, float]]) -> dict[float, float]:
    """A mapping from each median latency to its smoothed ratio p99 / median. Cells are (median, p99)."""
    ordered = sorted(cells)
    spreads = [p99 / ms for ms, p99 in ordered]
    window = min(_NEIGHBOURS, len(spreads))
    starts = (min(max(i - window // 2, 0), len(spreads) - window) for i in range(len(spreads)))
    return {ms: statistics.median(spreads[i : i + window]) for (ms, _), i in zip(ordered, starts, strict=True)}
