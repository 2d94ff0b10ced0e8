"""SlackFit: the server's default policy. It extends `paper.PaperSlackFit`, and cannot collapse. No jax."""

import bisect
import itertools
import math
from collections.abc import Sequence

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Decision, State, Table
from superserve_jax.subnet import Subnet


class SlackFit:
    """Picks the most accurate subnet that leaves time for the waiting queries and for the next burst.

    Let `latency(s, b)` be the profiled latency of subnet s at batch size b, `fast` the fastest subnet, and

        query_ms  = min over b of latency(fast, b) / b              time of one query at the highest throughput
        drain(b)  = max(near - b, 0) * query_ms / workers           time for the other queries that are due soon (`State.near`)
        capacity  = workers / query_ms                              highest throughput of all workers
        buffer    = -ln(risk) * variance / (2 * (capacity - rate)) / capacity       time kept free for the next burst

    1. **Batch.** b maximises `min(waiting, b) / latency(fast, b)`. Example: of 12 waiting queries, 8 run, not 12 padded to
       16. The other 4 wait for the next free worker.
    2. **Late.** If deferred queries are eligible, run `fast`. Deferred queries fill up the batch.
    3. **Risk.** If `slack - latency(fast, b) < max(drain(b), buffer)`, run `fast`.
    4. **Subnet.** Else run the most accurate subnet on the hull with

           latency(s, b) <= (1 - reserve) * slack - foresight * drain(b)     and     latency(s, b) <= (1 - reserve) * slo
           p99(s, b)     <= slack - foresight * drain(b)                     and     p99(s, b)     <= slo

       where slo is the shortest recent SLO. A query with this SLO may arrive at any moment and find all workers busy.
    5. **Guard.** If no subnet qualifies, run `fast`: with b if `latency(fast, b) <= slack`, else with the largest c < b with
       `latency(fast, c) <= slack - drain(c)`. If no c qualifies, the head is lost: run b anyway. With `defer`, all queries
       with a slack below `latency(fast, b)` then go behind the others.

    - The hull is the upper concave hull of accuracy over latency at batch size b. A subnet below it is less accurate than a
      mixture of two others that is as fast.
    - The reserve is for jitter. `p99` is the smoothed percentile `Table.tails`.
    - The drain time lets the policy react as soon as a burst arrives, before the slack of its first query is used up.
    - The buffer is for bursts near the capacity. A backlog exceeds x queries with probability exp(-2 (capacity - rate) x /
      variance): the stationary law of a reflected Brownian motion (Kingman's heavy-traffic approximation). The buffer is the
      time to serve the x that has probability `risk`. In calm traffic the buffer is close to 0.
    - Deferral avoids the domino effect of earliest deadline first. In strict order a backlog longer than the SLO makes every
      query a little too late. Deferred queries are answered when the backlog is gone, as in strict order.

    The policy cannot collapse: a backlog that the workers cannot clear within the head's slack runs at the highest throughput.

    If the head has a floor, `fast` is the fastest subnet that reaches it. The guard's batch then ends before the first query
    that a faster subnet could serve. Every batch ends before the first query whose floor exceeds the accuracy of its subnet
    (`dispatch.take`).

    Args:
      profile: the profile of the workers.
      reserve: share of the slack kept for jitter, from 0 to 1. A larger share misses fewer deadlines and is less accurate.
      foresight: share of the drain time kept for the waiting queries, from 0 to 1. A larger share has the same effect.
      risk: accepted probability that a backlog outgrows the buffer, above 0 and up to 1. 1 disables the buffer. Figures for
        the default with the paper's profile, slowed 1.9 times: at 85 % of the capacity (7,800 queries/s, CV^2 8), SlackFit
        misses 2 more of 10,000 deadlines than the fastest subnet. In bursty traffic from 6,000 queries/s on, its accuracy is
        within 0.3 points of the fluid bound.
      defer: whether lost queries are deferred. If False, queries run strictly in the order of deadlines.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> policy = SlackFit(profile)
    >>> for slack_ms, waiting in (36.0, 12), (36.0, 50), (12.0, 50), (0.0, 50):
    ...     decision = policy(profile, State(now_s=0.0, slack_ms=slack_ms, waiting=waiting, workers=8))
    ...     print(profile.row(decision.subnet).accuracy, decision.batch)
    0.8016 8
    0.8016 16
    0.7382 16
    0.7382 16
    """

    name = "slackfit"

    def __init__(
        self, profile: Profile, *, reserve: float = 0.1, foresight: float = 0.25, risk: float = 1e-5, defer: bool = True
    ):
        for name, share in ("reserve", reserve), ("foresight", foresight):
            if not 0 <= share <= 1:
                raise errors.ConfigError(f"{name} must be a share from 0 to 1, got {share}")
        if not 0 < risk <= 1:
            raise errors.ConfigError(f"risk must be a probability above 0 and up to 1, got {risk}")
        self._table = table = Table(profile)
        self._usable, self._foresight, self._safety, self._defer = 1 - reserve, foresight, -math.log(risk), defer
        fastest = table.rows[0]
        # For each number of waiting queries, up to the largest batch: index of the batch size by rule 1.
        self._size = tuple(
            max(range(len(fastest)), key=lambda size: (min(n, table.sizes[size]) / fastest[size], size))
            for n in range(table.sizes[-1] + 1)
        )
        self._query_ms = min(ms / b for b, ms in zip(table.sizes, fastest, strict=True))
        hulls = [_hull(column, table.accuracies) for column in table.columns]
        # For each batch size: latencies, 99th percentiles and ranks of the subnets on the hull.
        self._hulls = tuple(
            ([column[r] for r in ranks], [tail[r] for r in ranks], ranks)
            for column, tail, ranks in zip(table.columns, table.tails, hulls, strict=True)
        )

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        table, slack_ms, slo_ms = self._table, state.slack_ms, state.slo_ms
        queries = min(state.waiting, table.sizes[-1])
        size = self._size[queries]
        least = table.above(state.floors[0]) if state.floors else 0
        drain_ms = self._drain_ms(state, size)
        if state.late:
            why = "late"
        elif slack_ms - table.rows[0][size] < max(drain_ms, self._buffer_ms(state)):
            why = "risk"
        else:
            why, ahead_ms = "guard", self._foresight * drain_ms
            budget_ms = min(self._usable * slack_ms - ahead_ms, self._usable * slo_ms)
            tail_ms = min(slack_ms - ahead_ms, slo_ms)
            latencies, tails, ranks = self._hulls[size]
            fitting = min(bisect.bisect_right(latencies, budget_ms), bisect.bisect_right(tails, tail_ms))
            rank = max(ranks[max(fitting - 1, 0)], least)
            if table.columns[size][rank] <= budget_ms:
                why = "best" if rank == ranks[-1] else "slack"
                return _decision(table.subnets[rank], min(table.sizes[size], queries), why)
        if least:
            alike = itertools.takewhile(lambda floor: table.above(floor) >= least, state.floors[:queries])
            queries = sum(1 for _ in alike)
        return self._fastest(state, least, queries, why)

    def _fastest(self, state: State, rank: int, queries: int, why: str) -> Decision:
        """Apply rule 5 to the first `queries` queries. `rank` is the fastest subnet that reaches the head's floor."""
        table, best = self._table, self._size[queries]
        for size in range(best, -1, -1):
            limit_ms = state.slack_ms if size == best else state.slack_ms - self._drain_ms(state, size)
            if table.columns[size][rank] <= limit_ms:
                return _decision(table.subnets[rank], min(table.sizes[size], queries), why if size == best else "short")
        # The limit uses the fastest subnet of all: queries without the head's floor may still be saved.
        late_ms = table.rows[0][best] if self._defer else -math.inf
        return Decision(table.subnets[rank], min(table.sizes[best], queries), late_ms, reason="lost")

    def _drain_ms(self, state: State, size: int) -> float:
        waiting = state.waiting if state.near is None else state.near
        return max(waiting - self._table.sizes[size], 0) * self._query_ms / state.workers

    def _buffer_ms(self, state: State) -> float:
        """The buffer. The free capacity counts as at least 2 % of the capacity, so that the buffer stays finite."""
        capacity_qps = 1e3 * state.workers / self._query_ms
        left_qps = max(capacity_qps - state.rate_qps, 0.02 * capacity_qps)
        return 1e3 * self._safety * state.variance_qps / (2 * left_qps) / capacity_qps


def _decision(subnet: Subnet, batch: int, reason: str) -> Decision:
    return Decision._make((subnet, batch, -math.inf, reason))  # takes half the time of the constructor


def _hull(latencies: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """The ranks of the subnets on the upper concave hull of accuracy over latency, in ascending order."""
    hull: list[int] = []
    for rank, (x, y) in enumerate(zip(latencies, accuracies, strict=True)):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = ((latencies[k], accuracies[k]) for k in hull[-2:])
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(rank)
    return hull
