"""The waiting queries of a server: the queue, its limits, and the retries of failed batches. No jax."""

import math
from collections.abc import Callable, Sequence

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.admission import Admission
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.length_queue import LengthQueue, Queue
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.serving.flight import Failure, Flight, inference_error
from superserve_jax.serving.futures import Query
from superserve_jax.serving.options import Options
from superserve_jax.serving.retries import Retries
from superserve_jax.serving.telemetry import Counters
from superserve_jax.serving.threads import Outbox

_NOT_ADMITTED = (
    "the waiting queries leave no time to meet the deadline, and this server refuses such queries (admission=True); "
    "allow a longer slo_ms, submit more slowly, or add devices"
)
_EXPIRED = (
    "dropped, since its deadline could no longer be met (expire=True); "
    "allow a longer slo_ms, submit more slowly, or serve late with expire=False"
)


class QueueLimits:
    """Limits of the queue. Cancelled queries take no room.

    Args:
      profile: has the length buckets. With one shape for all inputs, the limit in bytes becomes a number of queries.
      options: have `max_queue` and `max_queue_bytes`.
      input_bytes: size of one input of the longest length.

    Attributes:
      most: how many queries may wait.
    """

    def __init__(self, profile: Profile, options: Options, *, input_bytes: int):
        self.most, self._limit = options.max_queue, f"max_queue={options.max_queue}"
        self._max_tokens, self._token_limit = math.inf, f"max_queue_bytes={options.max_queue_bytes}"
        if (most := options.max_queue_bytes // input_bytes) < options.max_queue:  # else even a full queue has fewer bytes
            if len(profile.lengths) > 1:
                self._max_tokens = options.max_queue_bytes * profile.lengths[-1] // input_bytes
            else:
                self.most, self._limit = most, f"{self._token_limit} ({input_bytes} each)"
        self._until_sweep = 0  # refusals

    def exceeded(self, waiting: Queue, count: int, lengths: Sequence[int]) -> str | None:
        """The limit that `count` new queries would exceed, with these lengths if inputs have one. None if there is room."""
        if len(waiting) + count > self.most:
            return self._limit
        if self._max_tokens < math.inf and isinstance(waiting, LengthQueue) and waiting.tokens(lengths) > self._max_tokens:
            return self._token_limit
        return None

    def make_room(self, waiting: Queue, count: int, lengths: Sequence[int], discard: Callable[[Query], bool]) -> None:
        """Searches a full queue for cancelled queries. Raises QueueFullError if it still has no room for the new queries.

        A search takes 0.1 us per waiting query. If n queries are left, the next search comes after n more refusals. So a
        refusal takes constant time on average.

        Args:
          waiting: the queue.
          count: number of new queries.
          lengths: lengths of the new queries, if inputs have a length.
          discard: returns whether a query can be removed.
        """
        self._until_sweep -= count
        if self._until_sweep <= 0:
            waiting.sweep(discard)
            self._until_sweep = len(waiting)
        if limit := self.exceeded(waiting, count, lengths):
            raise errors.QueueFullError(
                f"{len(waiting)} queries wait and {count} more would exceed {limit}; "
                f"submit more slowly, add devices, or raise {limit.partition('=')[0]}"
            )


class Backlog:
    """Queue and retries of one pool, with the rules for what enters and leaves them. The caller holds the pool's lock.

    Args:
      profile: the profile of the first worker.
      options: the options of the server.
      input_bytes: size of one input of the longest length.
      outbox: takes the queries that fail, and every query that is removed.
      counters: the counters of the server.

    Attributes:
      queue: the queries whose batches have not failed.
      meter: measures the arrivals in this queue.
      retries: the queries whose batches have failed, in groups. They go before the queue, since they have waited longer.
      best: the highest accuracy that every worker offers.
      fastest_s: the lowest latency of any worker and subnet, for one query.
      most: how many queries may wait in the queue.
    """

    def __init__(self, profile: Profile, options: Options, *, input_bytes: int, outbox: Outbox, counters: Counters):
        self.queue, self.meter = length_queue.make_queue(profile), ArrivalMeter()
        self.best = self.fastest_s = math.inf
        self.retries = Retries(profile, max_tries=options.max_tries)
        self._profile = profile
        self._has_lengths = len(profile.lengths) > 1
        self._limits = QueueLimits(profile, options, input_bytes=input_bytes)
        self.most = self._limits.most
        self._admission = Admission(profile) if options.admission else None
        self._expire = options.expire
        self._outbox, self._counters = outbox, counters

    def __len__(self) -> int:
        return sum(map(len, self._queues()))

    def could_hold(self, lengths: Sequence[int]) -> bool:
        """Whether an empty queue has room for queries of these lengths. Lengths do not count if all inputs have one shape."""
        return not self._limits.exceeded(length_queue.make_queue(self._profile), len(lengths), lengths)

    def items(self) -> list[Query]:
        """Every query, left in place, in no order."""
        return [query for queue in self._queues() for query in queue.items()]

    def _queues(self) -> list[Queue]:
        return [self.queue, *(group.waiting for group in self.retries.groups)]

    # -- in ---------------------------------------------------------------------------------------------------------------

    def add(self, queries: Sequence[Query], fleet: Fleet, *, idle: bool) -> None:
        """Queues all of `queries`, which share deadline and floor, or raises and queues none.

        Args:
          idle: whether a worker is idle.
        """
        first = queries[0]
        if first.floor > self.best:  # `best` has fallen since `check_floor`
            raise self._floor_error(first)
        lengths = [query.length for query in queries] if self._has_lengths else ()
        if self._limits.exceeded(self.queue, len(queries), lengths):
            self._limits.make_room(self.queue, len(queries), lengths, self._discard)
        self.meter.shorten(first.submitted_s, 1e3 * (first.deadline_s - first.submitted_s))
        if (
            self._admission is not None
            and fleet.strength()[1]
            and not self._admission.admits(
                self.queue,
                fleet,
                first.submitted_s,
                first.deadline_s,
                shortest_ms=self.meter.slo_ms,
                count=len(queries),
                floor=first.floor,
                length=max(lengths, default=0),
                idle=idle and not len(self.queue),
            )
        ):
            raise errors.AdmissionError(_NOT_ADMITTED)
        self.queue.push_all(first.deadline_s, queries, first.floor, lengths)

    def give_back(self, flight: Flight, worker: int) -> None:
        """Puts a batch back into the queue, or into a group of retries if it came from one. It does not count as failed."""
        self._outbox.drop(flight)
        self._counters.requeued += sum(not query.done() for query in flight.batch)
        if flight.retry is not None:
            self.retries.give_back(flight.batch, flight.retry, worker)
        else:
            for query in flight.batch:
                self.queue.push(query.deadline_s, query, query.floor, query.length)
        self._refuse_above_best()

    def retry(
        self, flight: Flight, failure: Failure, *, worker: int, name: str, workers: int, now_s: float, hung: bool = False
    ) -> None:
        """Puts the queries of a failed batch into groups of retries. A query without tries or slack left fails.

        Args:
          flight: the failed batch.
          failure: the engine's error.
          worker, name: index and name of the worker on which the batch failed.
          workers: how many workers are alive.
          now_s: the time now.
          hung: whether the batch never came back.
        """
        self._outbox.drop(flight)
        if failure.lost:
            flight.batch = self._unexpired(flight.batch, now_s)
            now_s = -math.inf  # late is better than never
        live = sum(not query.done() for query in flight.batch)
        hopeless = self.retries.failed(flight.batch, flight.retry, worker, now_s=now_s, workers=workers, hung=hung)
        self._counters.failed += len(hopeless)
        self._counters.requeued += live - len(hopeless)
        for query, why in hopeless:
            self._outbox.fail(query, inference_error(query, name, why, failure))
        self._refuse_above_best()

    # -- out --------------------------------------------------------------------------------------------------------------

    def prune(self, now_s: float) -> None:
        """Removes cancelled queries from the front of the queue. With `expire`, also drops queries that will be too late.

        A cancelled query further back counts as waiting until it reaches the front or the queue is full.
        """
        if self._expire:
            for query in self.queue.pop_before(now_s + self.fastest_s):
                if not self._discard(query):
                    self._drop_expired(query)
        self.queue.drop_late(self._discard)
        while (head := self.queue.head()) is not None and head.done():
            self._outbox.drop(self.queue.pop(1))

    def _unexpired(self, queries: Sequence[Query], now_s: float) -> list[Query]:
        """The queries that may still be answered. With `expire`, late ones fail."""
        late = {query for query in queries if self._expire and query.deadline_s <= now_s and not query.done()}
        for query in late:
            self._drop_expired(query)
        return [query for query in queries if query not in late]

    def _drop_expired(self, query: Query) -> None:
        self._counters.expired += 1
        self._outbox.fail(query, errors.DeadlineExpiredError(_EXPIRED))

    def fail_all(self, reason: Callable[[], errors.SuperServeError]) -> None:
        """Fails all waiting queries."""
        for query in [query for queue in self._queues() for query in queue.drain()]:
            if not self._discard(query):
                self._counters.failed += 1
                self._outbox.fail(query, reason())

    def _discard(self, query: Query) -> bool:
        """Whether a query is done, for example cancelled. If so, the outbox takes it."""
        if query.done():
            self._outbox.drop(query)
            return True
        return False

    def _refuse_above_best(self) -> None:
        """Fails queries whose floor exceeds `best`, which falls when a worker joins or the export is swapped."""
        for query in [query for queue in self._queues() for query in queue.pop_above(self.best)]:
            if not self._discard(query):
                self._counters.failed += 1
                self._outbox.fail(query, self._floor_error(query))

    # -- other profiles ---------------------------------------------------------------------------------------------------

    def offer(self, best: float, fastest_s: float) -> None:
        """Notes what the workers offer from now on (see the attributes)."""
        self.best, self.fastest_s = best, fastest_s
        self._refuse_above_best()

    def retime(self, profile: Profile) -> None:
        """Measures the waiting work by `profile` from now on."""
        if self._admission is not None:
            self._admission = Admission(profile)
        self.retries.profile, pushed = profile, self.queue.pushed
        for queue in self._queues():
            queue.retime(profile)
        if pushed:
            self.meter.rescale(self.queue.pushed / pushed)

    def _floor_error(self, query: Query) -> errors.SuperServeError:
        return errors.AccuracyFloorError(
            f"min_accuracy={query.floor}, but the best subnet that every worker serves now has {self.best}; ask for no more"
        )
