"""Admission control: refuse a query on arrival if its deadline cannot be met. Server and simulator share it. No jax.

Without admission control, an overloaded server accepts queries until its queue is full, and answers many of them late. With
admission control, a client learns at once that it should ask another server. The queue stays as short as the SLOs require.
"""

import bisect
import itertools
import math

from superserve_jax.profile import Profile
from superserve_jax.scheduling.length_queue import Queue
from superserve_jax.scheduling.speeds import Fleet

_USABLE = 0.9  # share of the slack that may be planned; the rest is for jitter, like SlackFit's reserve
_PAUSE_S = 0.05  # an overload is over after this time without refusals
_PATIENCE_S = 0.2  # a longer overload is not a burst


class Admission:
    """Decides which queries are admitted, and remembers how long the present overload has lasted.

    A query is admitted if

        (work due before it + its own batch) / speed of the workers  <=  0.9 * slack

    where all terms are times. The work is the time that the queries need at the highest throughput of the fastest subnet, as
    if none had a floor.

    This rule alone is unfair to short SLOs. For example, queries with long SLOs book the capacity of the next 200 ms. A query
    that is due in 20 ms then finds no free capacity. In a burst this is fine, because queries with long SLOs can wait until
    the burst is over. But after 0.2 s of refusals, a second rule treats all SLOs alike. A query is also refused if

        time for all waiting queries and this one  >  0.9 * shortest recent SLO - time for one batch on each worker

    One batch for each worker may always wait.

    Args:
      profile: the profile of the first worker. `Fleet` knows the speeds of the other workers.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> from superserve_jax.scheduling.queue import DeadlineQueue
    >>> profile, waiting = paper_profile(), DeadlineQueue()
    >>> admission, fleet = Admission(profile), Fleet([profile] * 8)
    >>> waiting.push_all(0.036, range(500))
    >>> [admission.admits(waiting, fleet, 0.0, deadline_s, shortest_ms=36.0) for deadline_s in (0.035, 0.036, 0.044)]
    [True, False, True]
    """

    def __init__(self, profile: Profile):
        tables = profile.each_length
        self._sizes, self._lengths = profile.batch_sizes, profile.lengths[:-1]
        self._query_ms = tuple(1e3 / t.throughput_qps(t.rows[0].subnet) for t in tables)
        self._unit_ms = 1.0 if len(tables) > 1 else self._query_ms[0]  # one unit of the queue's work
        self._accuracies = tuple(row.accuracy for row in profile.rows)
        # For each length bucket, batch size and row: the lowest latency among this row and all more accurate rows.
        self._latency_ms = tuple(
            tuple(_lowest(column) for column in zip(*(row.latency_ms for row in t.rows), strict=True)) for t in tables
        )
        self._since_s = self._last_s = -math.inf  # first and last refusal of the current overload

    def admits(
        self,
        waiting: Queue,
        fleet: Fleet,
        now_s: float,
        deadline_s: float,
        *,
        shortest_ms: float,
        count: int = 1,
        floor: float = 0.0,
        length: int = 0,
        idle: bool = False,
    ) -> bool:
        """Whether queries that arrive now are admitted: all of them or none. O(log n).

        Args:
          waiting: the queue, without the new queries.
          fleet: the speeds of the workers.
          now_s: the present time.
          deadline_s: the deadline of the new queries.
          shortest_ms: the shortest recent SLO (`ArrivalMeter.slo_ms`).
          count: number of new queries.
          floor: the highest floor of the new queries.
          length: the longest length of the new queries in tokens, 0 if unknown.
          idle: whether a worker is idle, so that the first batch does not wait.
        """
        workers, alive = fleet.strength()
        if not alive:
            return False
        place = bisect.bisect_left(self._lengths, length) if length else -1
        query_ms, most, slack_ms = self._query_ms[place], self._sizes[-1], 1e3 * _USABLE * (deadline_s - now_s)
        unit = waiting.head_work * self._unit_ms / query_ms  # work of one waiting query, in queries like the new ones

        def needs_ms(queries: float, *, idle: bool) -> float:
            size = bisect.bisect_left(self._sizes, min(queries, most))
            batch_ms = self._latency_ms[place][size][bisect.bisect_left(self._accuracies, floor)]
            ahead = max(queries - most, 0) if idle else queries
            return (ahead * query_ms + batch_ms * alive) / workers

        admitted = needs_ms(waiting.due_by(deadline_s) * unit + count, idle=idle) <= slack_ms
        if not admitted and needs_ms(count, idle=True) > slack_ms:
            return False  # this deadline could not be met by idle workers either, so it is no sign of an overload
        if admitted and now_s - self._last_s < _PAUSE_S and self._last_s - self._since_s > _PATIENCE_S:
            batches_ms = most * query_ms * alive / workers  # one batch for each worker
            waits_ms = (waiting.due_by(math.inf) * unit + count) * query_ms / workers
            admitted = waits_ms <= max(_USABLE * shortest_ms - batches_ms, batches_ms)
        if not admitted:
            if now_s - self._last_s >= _PAUSE_S:
                self._since_s = now_s
            self._last_s = now_s
        return admitted


def _lowest(latency_ms: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(itertools.accumulate(reversed(latency_ms), min))[::-1]
