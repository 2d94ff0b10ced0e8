"""What is refused at arrival: what the queue has no room for, and, if asked, what cannot be met any more. No jax.

Without admission control an overloaded server takes every query until its queue is full, and answers late what it cannot
answer in time. With it the client hears at once, while there is still time to ask somebody else, and the queue stays as short
as the SLOs demand. Server and simulator share it.
"""

import bisect
import itertools
import math

from superserve_jax.profile import Profile
from superserve_jax.scheduling.queue import Queue
from superserve_jax.scheduling.speeds import Fleet

_USABLE = 0.9  # of the slack; the rest is for jitter, as SlackFit's reserve is. In an overload it costs nothing: others wait
_PAUSE_S = 0.05  # without refusals, after which an overload is over
_PATIENCE_S = 0.2  # an overload that is longer is no burst


class Admission:
    """Decides who is admitted, and remembers for how long it has had to refuse.

    A query waits until the workers have served, with the fastest subnet at its highest throughput, what is due before it, and
    then for its own batch. What waits counts as though it had no floor.

    That alone would be unfair to short SLOs: long ones book the capacity of the next 200 ms, and a query that is due in 20 ms
    finds it taken. A burst may be served like that, since long ones can wait until it is over; but where queries have been
    refused for more than 0.2 s, all are refused alike, as soon as more waits than can be served within the shortest SLO of
    late, or in one batch for each worker.

    Args:
      profile: of the first worker; how fast the others are, and how fast all of them are of late, the fleet knows.

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
        self._unit_ms = 1.0 if len(tables) > 1 else self._query_ms[0]  # of the queue's work
        self._accuracies = tuple(row.accuracy for row in profile.rows)
        # By length bucket and batch size, the lowest latency among a row and those above it.
        self._latency_ms = tuple(
            tuple(_lowest(column) for column in zip(*(row.latency_ms for row in t.rows), strict=True)) for t in tables
        )
        self._since_s = self._last_s = -math.inf  # the first and the last refusal of an overload

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
        """Whether queries that come now are admitted: all or none. O(log n).

        Args:
          waiting: the queue, without them.
          shortest_ms: the shortest SLO of late (`queue.Meter.slo_ms`).
          count: how many they are, with one deadline.
          floor, length: their highest floor and their longest length; 0 for a length that is not known.
          idle: whether a worker is idle, for which the first batch need not wait.
        """
        workers, alive = fleet.strength()
        if not alive:
            return False
        place = bisect.bisect_left(self._lengths, length) if length else -1
        query_ms, most, slack_ms = self._query_ms[place], self._sizes[-1], 1e3 * _USABLE * (deadline_s - now_s)
        unit = waiting.head_work * self._unit_ms / query_ms  # in queries like these

        def needs_ms(queries: float, *, idle: bool) -> float:
            size = bisect.bisect_left(self._sizes, min(queries, most))
            batch_ms = self._latency_ms[place][size][bisect.bisect_left(self._accuracies, floor)]
            ahead = max(queries - most, 0) if idle else queries
            return (ahead * query_ms + batch_ms * alive) / workers

        admitted = needs_ms(waiting.due_by(deadline_s) * unit + count, idle=idle) <= slack_ms
        if not admitted and needs_ms(count, idle=True) > slack_ms:
            return False  # at any time, so it says nothing about the load
        if admitted and now_s - self._last_s < _PAUSE_S and self._last_s - self._since_s > _PATIENCE_S:
            batches_ms = most * query_ms * alive / workers  # one for each worker
            waits_ms = (waiting.due_by(math.inf) * unit + count) * query_ms / workers
            admitted = waits_ms <= max(_USABLE * shortest_ms - batches_ms, batches_ms)
        if not admitted:
            if now_s - self._last_s >= _PAUSE_S:
                self._since_s = now_s
            self._last_s = now_s
        return admitted


def _lowest(latency_ms: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(itertools.accumulate(reversed(latency_ms), min))[::-1]
