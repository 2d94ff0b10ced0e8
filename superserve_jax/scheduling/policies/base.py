"""What a policy is asked, what it answers, and the look-up table that the policies share. No jax.

With length buckets a policy is asked with the profile at the head's, and what it is told about the traffic is in units of it.
Where workers have profiles of their own, it is asked with that of the worker that is free. Of a worker that is slower than its
profile of late, all times and rates are in units of its profile, as though time ran faster (see `drift`).
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
      slack_ms: time left until the earliest deadline; negative where it has passed.
      waiting: number of queries in the queue, at least 1; with length buckets, of those that are no longer than the head's.
      floors: the lowest accuracy that each of the first waiting queries accepts, in the queue's order, up to the largest
        batch; empty where none of them has a floor.
      workers: number of live workers, the asking one counted; where they are not equally fast, what they carry together over
        what the asking one does, which need not be a whole number.
      last_subnet: what the asking worker ran last, None if nothing yet.
      late: how many of `waiting` have stepped back because they could not be met (`Decision.defer_ms`).
      rate_qps, variance_qps: of late, mean and variance per second of the number of arrivals (see `queue.Meter`); the
        variance of a Poisson process is its rate. 0 as long as nothing is known. With length buckets a query counts here and
        in `near` for its work over that of one of the head's length (see `padding.LengthQueue`).
      slo_ms: the shortest SLO with which a query has come in the last second or two; infinite as long as nothing is known.
      worker: which worker asks, from 0.
      near: how many of those that wait are due within twice the slack or the shortest SLO, whichever is longer; None where
        nobody has counted.
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
      defer_ms: queries with less slack than this first step back behind all the others, for good; by default none does.
      reason: a word for why, for the server's counters: one of `REASONS` or your own; empty where nobody says.
    """

    subnet: Subnet
    batch: int
    defer_ms: float = -math.inf
    reason: str = ""


REASONS = {
    "best": "the most accurate subnet: there is time for it",
    "slack": "the most accurate subnet for which there is time",
    "late": "the fastest subnet, since late queries wait",
    "risk": "the fastest subnet, since a burst could make others late",
    "guard": "the fastest subnet: there is no time for another",
    "short": "the fastest subnet and fewer queries: else the first would be late",
    "lost": "no choice saves the first query",
    "floor": "the first query asks for more accuracy than the policy's choice has",
}
"""Why a batch was dispatched as it was, as the policies of this package say; "floor" is said by `dispatch`."""


Policy = Callable[[Profile, State], Decision]
"""`policy(profile, state) -> Decision`, a pure function. Any callable will do. Those of this package are built for one profile
and hold tables of it; they do not look at the profile they are passed."""


_NEIGHBOURS = 9  # cells next to one another in latency, whose spread is taken together


class Table:
    """Latencies of the Pareto-optimal subnets, ascending along both axes, so that every choice is a bisection.

    A subnet is named by its rank in accuracy, a batch by its index in `sizes`.

    Attributes:
      rows, columns: median latencies, of each subnet and of each size.
      tails: by size, latencies that one batch in a hundred exceeds. A 99th percentile out of some tens of calls is nearly
        their maximum, and one disturbance decides it; so each cell's is its median times the middle one of the ratios of
        the nine cells around it in the order of their latencies. Where none was measured, the medians.

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
        """The most accurate subnet that does a batch within the budget; -1 where none does."""
        return bisect.bisect_right(self.columns[size], budget_ms) - 1

    def largest_batch(self, rank: int, budget_ms: float) -> int:
        """The largest batch that a subnet does within the budget; -1 where it does none."""
        return bisect.bisect_right(self.rows[rank], budget_ms) - 1

    def above(self, floor: float) -> int:
        """The least accurate subnet that meets a floor; the most accurate where none does."""
        return min(bisect.bisect_left(self.accuracies, floor), len(self.accuracies) - 1)


def _spreads(cells: Sequence[tuple[float, float]]) -> dict[float, float]:
    """99th percentile over median at each latency, out of cells of median and 99th percentile."""
    ordered = sorted(cells)
    spreads = [p99 / ms for ms, p99 in ordered]
    window = min(_NEIGHBOURS, len(spreads))
    starts = (min(max(i - window // 2, 0), len(spreads) - window) for i in range(len(spreads)))
    return {ms: statistics.median(spreads[i : i + window]) for (ms, _), i in zip(ordered, starts, strict=True)}
