"""The simulator: a server on a virtual clock, with latencies read from a profile. No jax.

It runs the server's own queue, `dispatch`, `admission`, `speeds` and policies. Only time is simulated: a batch takes its
profiled latency, and the clock jumps from one event to the next. So a minute of traffic takes about a second.

This is one file because a run fills all of `SimulationResult`. `cluster` describes the simulated server.

An event is an arrival, the end of a batch, or a planned failure. `Simulation.run` is the loop over the events:

    1. Jump to the next event. While all workers are busy, arrivals are no events: nothing happens to them before a batch ends.
    2. Put the queries that have arrived by now into the queue.
    3. Handle all events that are due by now: batches that end, workers that leave or return, stalls.
    4. While a worker is idle and a query waits, dispatch a batch. Its end is a new event.
"""

import bisect
import collections
import contextlib
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile, profiles_of_workers
from superserve_jax.scheduling import dispatch, length_queue, policies
from superserve_jax.scheduling.admission import Admission
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.simulation import metrics, patience
from superserve_jax.simulation.cluster import Cluster, Outage
from superserve_jax.simulation.traces import Trace

MET, LATE, EXPIRED, REFUSED = range(4)
"""Outcomes of a query: answered by its deadline, answered later, given up without an answer, refused on arrival."""


@dataclasses.dataclass(frozen=True, eq=False)
class SimulationResult:
    """What happened to each query. Every array has one element per query, in the order of arrival.

    Args:
      arrival_s: time of arrival, from the trace.
      deadline_s: deadline, from the trace.
      start_s: start of the query's batch; infinite if the query was never answered.
      finish_s: end of the query's batch; infinite if the query was never answered.
      accuracy: profiled accuracy of the subnet that answered the query; NaN if none did.
      batch: number of queries in the query's batch; 0 if the query was never answered.
      worker: number of the worker that answered the query; -1 if none did.
      outcome: MET, LATE, EXPIRED or REFUSED.
    """

    arrival_s: np.ndarray
    deadline_s: np.ndarray
    start_s: np.ndarray
    finish_s: np.ndarray
    accuracy: np.ndarray
    batch: np.ndarray
    worker: np.ndarray
    outcome: np.ndarray

    @property
    def attainment(self) -> float:
        """See `metrics.attainment`."""
        return metrics.attainment(self.deadline_s, self.finish_s)

    @property
    def mean_accuracy(self) -> float:
        """See `metrics.mean_accuracy`."""
        return metrics.mean_accuracy(self.deadline_s, self.finish_s, self.accuracy)


def simulate(
    profile: Profile | Sequence[Profile],
    policy: str | Policy,
    trace: Trace,
    *,
    cluster: Cluster | None = None,
    seed: int = 0,
    stall_s: float = 5.0,
) -> SimulationResult:
    """Simulate a server that serves a trace, until every query has an outcome.

    Args:
      profile: one profile for all workers, or one for each. With length buckets, an unknown length counts as the longest.
      policy: a policy, or its name (see `policies.create`).
      trace: the traffic.
      cluster: the workers, options and failures. By default eight workers and no failures.
      seed: seed of the latency noise.
      stall_s: how long, in real time, your own policy may take for one decision (see `patience`).

    Raises PolicyError if the policy fails. The message is the same as in a server.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> from superserve_jax.simulation import traces
    >>> trace = traces.gamma(rate_qps=2000.0, duration_s=1.0)
    >>> result = simulate(paper_profile(), "fixed:smallest", trace)
    >>> result.attainment, round(result.mean_accuracy, 4)
    (1.0, 0.7382)
    """
    with watched(policy, stall_s) as decide:
        simulation = Simulation(profile, policy, cluster or Cluster(), seed=seed, decide=decide)
        simulation.extend(*columns(trace))
        simulation.run()
        return simulation.result(trace)


@contextlib.contextmanager
def watched(policy: str | Policy, stall_s: float = 5.0) -> Iterator[dispatch.Decide]:
    """A function that asks a policy. While this is open, it ends a policy of your own that takes longer than `stall_s`."""
    own = callable(policy) or policies.is_custom(policy)
    with patience.Patience(stall_s if own else math.inf) as watch:
        yield watch.decide if own else dispatch.decide


def columns(trace: Trace) -> tuple[np.ndarray, ...]:
    """Arrivals and deadlines in seconds, SLOs in milliseconds, floors and lengths of all queries: arguments of `extend`."""
    arrivals_s, *others = np.broadcast_arrays(trace.arrivals_s, trace.slo_ms, trace.floors, trace.lengths)
    return arrivals_s, trace.deadlines_s, *others


class _Batch(NamedTuple):
    """A running batch."""

    worker: int
    queries: list[int]
    start_s: float
    accuracy: float
    profiled_ms: float
    begin_s: float  # from when on the server counts its latency


class Simulation:
    """One run, which can be continued. An event is a heap entry (time, number, method, argument). Unique numbers break ties.

    Args:
      profile: one profile for all workers, or one for each.
      policy: a policy, or its name.
      cluster: the workers, options and failures.
      seed: seed of the latency noise.
      decide: how the policy is asked (see `watched`).
    """

    def __init__(
        self,
        profile: Profile | Sequence[Profile],
        policy: str | Policy,
        cluster: Cluster,
        *,
        seed: Any = 0,
        decide: dispatch.Decide = dispatch.decide,
    ):
        self.profiles, self.cluster, self.decide = profiles_of_workers(profile, cluster.workers), cluster, decide
        self.policy = policies.create(policy, *self.profiles)
        first = self.profiles[0]  # all profiles have the same batch sizes and lengths
        self.fleet = Fleet(self.profiles, correct=cluster.follow_drift)
        self.factors = _latency_factors(cluster.noise, seed)
        self.padded = [first.batch_index(n) for n in range(first.max_batch + 1)]
        self.fastest_s = 1e-3 * min(p.at_length(0).fastest().latency_ms[0] for p in self.profiles)
        self.half_trip_s, self.lead_s = 5e-4 * cluster.round_trip_ms, 1e-3 * cluster.lead_ms
        self.arrivals: list[float] = [math.inf]
        self.deadlines: list[float] = []
        self.slo_ms: list[float] = []
        self.floors: list[float] = []
        self.lengths: list[int] = []
        self.arrived = 0
        self.queue = length_queue.make_queue(first)
        self.meter = ArrivalMeter()
        self.admission = Admission(first)

        self.idle = collections.deque(range(cluster.workers))
        self.running: list[collections.deque[_Batch]] = [collections.deque() for _ in range(cluster.workers)]
        self.full: set[int] = set()  # workers with two batches that could take another one but for this limit
        self.device_free_s = [0.0] * cluster.workers  # when each device is done with the batches that it got
        self.last_subnet: list[Any] = [None] * cluster.workers
        # For each worker, the number of outages that it is in, since they may overlap, and of those that nobody may know of.
        self.outages, self.silent = [0] * cluster.workers, [0] * cluster.workers
        self.stalled_until_s = 0.0
        # Finished batches as flat lists of numbers, which the garbage collector need not visit.
        self.answered: list[int] = []  # queries of all batches, one batch after another
        self.sizes: list[int] = []  # sizes of the batches
        self.batches: list[float] = []  # worker, start, finish and accuracy of each batch
        self.expired: list[int] = []
        self.refused: list[int] = []

        # Sentinels: the last arrival and the last event have time infinity.
        self.events: list[tuple[float, int, Callable[[float, Any], None], Any]] = [(math.inf, 0, self._stall, None)]
        self.numbers = itertools.count(1)
        for outage in cluster.outages:
            self._at(outage.from_s, self._fall_silent, outage.worker)
            self._at(outage.from_s + outage.noticed_s, self._leave, outage)
            if outage.until_s < math.inf:
                self._at(outage.until_s, self._come_back, outage.worker)
        for stall in cluster.stalls:
            self._at(stall.from_s, self._stall, stall.until_s)

    def extend(
        self, arrivals_s: np.ndarray, deadlines_s: np.ndarray, slo_ms: np.ndarray, floors: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Adds queries. They arrive after those that were added before, and not before the time up to which it has run.

        Raises AccuracyFloorError and InputError for queries that the profiles cannot serve.
        """
        best, buckets = min(p.rows[-1].accuracy for p in self.profiles), self.profiles[0].lengths
        if np.any(floors > best):
            raise errors.AccuracyFloorError(f"a floor of {np.max(floors)} is above the best subnet's {best}; lower it")
        if buckets and np.any(lengths > buckets[-1]):
            raise errors.InputError(f"a query of {np.max(lengths)} tokens, but the longest length bucket has {buckets[-1]}")
        self.arrivals[-1:] = [*arrivals_s.tolist(), math.inf]
        self.deadlines += deadlines_s.tolist()
        self.slo_ms += _list(slo_ms)
        self.floors += _list(floors)
        self.lengths += lengths.tolist()

    @property
    def unanswered(self) -> int:
        """Number of added queries without an answer."""
        return len(self.arrivals) - 1 - len(self.answered) - len(self.expired) - len(self.refused)

    def run(self, until_s: float = math.inf) -> None:
        """Runs to a time. What happens at this time is left for the next call."""
        arrivals, events, waiting, idle = self.arrivals, self.events, self.queue, self.idle
        while True:
            now_s = events[0][0]
            if idle and arrivals[self.arrived] < now_s:
                now_s = min(now_s, max(arrivals[self.arrived], self.stalled_until_s))
            if now_s >= until_s:
                break
            if arrivals[self.arrived] <= now_s:
                self._admit(now_s)
            while events[0][0] <= now_s:
                _, _, happens, argument = heapq.heappop(events)
                happens(now_s, argument)
            if now_s >= self.stalled_until_s:
                while idle and len(waiting):
                    self._dispatch(now_s)

    def _at(self, time_s: float, happens: Callable[[float, Any], None], argument: Any) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), happens, argument))

    def _admit(self, now_s: float) -> None:
        """Put the queries that have arrived by now into the queue, or refuse them."""
        first = self.arrived
        self.arrived = end = bisect.bisect_right(self.arrivals, now_s, first)
        if self.cluster.max_queue < math.inf:
            admitted = min(end, first + max(int(self.cluster.max_queue) - len(self.queue), 0))
            self.refused += range(admitted, end)
            end = admitted
        push, deadlines, floors, tokens = self.queue.push, self.deadlines, self.floors, self.lengths
        if first < end:
            self.meter.shorten(now_s, min(self.slo_ms[first:end]))
        for i in range(first, end):
            if self.cluster.admission and not self._admits(i):
                self.refused.append(i)
            else:
                push(deadlines[i], i, floors[i], tokens[i])

    def _admits(self, i: int) -> bool:
        """Whether a query is admitted. It may have arrived before now, but nothing else has happened since its arrival."""
        return self.admission.admits(
            self.queue,
            self.fleet,
            self.arrivals[i],
            self.deadlines[i],
            shortest_ms=self.meter.slo_ms,
            floor=self.floors[i],
            length=self.lengths[i],
            idle=bool(self.idle) and not len(self.queue),
        )

    def _dispatch(self, now_s: float) -> None:
        """Let one idle worker take a batch."""
        waiting = self.queue
        if self.cluster.expire:
            self.expired += waiting.pop_before(now_s + self.fastest_s)
            if not len(waiting):
                return
        worker = self.idle.popleft()
        last, pace = self.last_subnet[worker], self.fleet.pace(worker)
        turn = Turn(waiting, self.meter, self.policy, self.profiles[worker], pace, last, worker, self.decide)
        row, queries, _ = dispatch.next_batch(turn, now_s)
        profiled_ms = row.latency_ms[self.padded[len(queries)]]
        latency_ms = profiled_ms * next(self.factors) * self._slowdown(worker, now_s) + self.cluster.overhead_ms
        actuation_ms = 0.0
        if row.subnet != last:
            actuation_ms = self.cluster.actuation_ms
            self.last_subnet[worker] = row.subnet
        begin_s = max(now_s + self.half_trip_s, self.device_free_s[worker])
        self.device_free_s[worker] = done_s = begin_s + 1e-3 * (latency_ms + actuation_ms)
        counts_s = (begin_s if self.lead_s else now_s) + 1e-3 * actuation_ms
        batch = _Batch(worker, queries, now_s, row.accuracy, profiled_ms, counts_s)
        self.running[worker].append(batch)
        self._at(done_s + self.half_trip_s, self._finish, batch)
        if self.lead_s:
            self._at(done_s + self.half_trip_s - self.lead_s, self._take_next, batch)

    def _slowdown(self, worker: int, now_s: float) -> float:
        """The factor on the latency of a batch that starts now."""
        slowdowns = self.cluster.slowdowns
        return math.prod([s.factor for s in slowdowns if s.worker in (None, worker) and s.from_s <= now_s < s.until_s])

    def _take_next(self, now_s: float, batch: _Batch) -> None:
        """A worker with this batch as its last one may take another one. As in the server, it has at most two at a time."""
        running = self.running[batch.worker]
        if running and running[-1] is batch:  # else the worker left meanwhile
            (self.idle.append if len(running) == 1 else self.full.add)(batch.worker)

    def _finish(self, now_s: float, batch: _Batch) -> None:
        worker, running = batch.worker, self.running[batch.worker]
        if self.silent[worker] or not running or running[0] is not batch:
            return  # the batch's worker is gone, or was gone meanwhile
        if now_s < self.stalled_until_s:
            self._at(self.stalled_until_s, self._finish, batch)
            return
        running.popleft()
        end_s = now_s - self.half_trip_s if self.lead_s else now_s
        self.fleet.observe(worker, batch.profiled_ms, 1e3 * (end_s - batch.begin_s))
        if not self.lead_s or worker in self.full:
            self.full.discard(worker)
            self.idle.append(worker)
        self.answered += batch.queries
        self.sizes.append(len(batch.queries))
        self.batches += (worker, batch.start_s, now_s, batch.accuracy)

    def _stall(self, now_s: float, until_s: float) -> None:
        self.stalled_until_s = max(self.stalled_until_s, until_s)
        self._at(until_s, lambda *_: None, None)  # an event that does nothing, so that the loop dispatches at `until_s`

    def _fall_silent(self, now_s: float, worker: int) -> None:
        self.silent[worker] += 1

    def _leave(self, now_s: float, outage: Outage) -> None:
        worker = outage.worker
        self.outages[worker] += 1
        if self.outages[worker] > 1:
            return
        self.fleet.leave(worker)
        batches, self.running[worker], self.last_subnet[worker] = self.running[worker], collections.deque(), None
        self.full.discard(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        late = outage.noticed_s > 0 and not self.cluster.expire  # as in the server, which answers what a lost process had
        for i in itertools.chain.from_iterable(batch.queries for batch in batches):
            if late or self.deadlines[i] > now_s:
                self.queue.push(self.deadlines[i], i, self.floors[i], self.lengths[i])
            else:
                self.expired.append(i)

    def _come_back(self, now_s: float, worker: int) -> None:
        self.outages[worker] -= 1
        self.silent[worker] -= 1
        if not self.outages[worker]:
            self.fleet.come_back(worker)
            self.device_free_s[worker] = now_s
            self.idle.append(worker)

    def result(self, trace: Trace) -> SimulationResult:
        """Ends a run that has no more events. `trace` has all queries that were added, in their order.

        If all workers have left for good, the waiting queries are given up.
        """
        self.events.clear()  # events refer to methods of this object; without this reference cycle it is freed at once
        self.expired += self.queue.drain()
        self.refused += range(self.arrived, len(self.arrivals) - 1)
        n = len(trace)
        start_s, finish_s, accuracy = np.full(n, np.inf), np.full(n, np.inf), np.full(n, np.nan)
        batch, worker = np.zeros(n, np.int32), np.full(n, -1, np.int32)
        outcome = np.full(n, LATE, np.uint8)
        order, sizes = np.array(self.answered, np.int64), np.array(self.sizes, np.int64)
        batch[order] = np.repeat(sizes, sizes)
        columns = np.array(self.batches).reshape(-1, 4).T
        for array, column in zip((worker, start_s, finish_s, accuracy), columns, strict=True):
            array[order] = np.repeat(column, sizes)
        deadline_s = trace.deadlines_s
        outcome[finish_s <= deadline_s] = MET
        outcome[self.expired] = EXPIRED
        outcome[self.refused] = REFUSED
        return SimulationResult(trace.arrivals_s, deadline_s, start_s, finish_s, accuracy, batch, worker, outcome)


def _list(values: np.ndarray) -> list[float]:
    """The values as a list. Equal values are one object, since each object takes memory."""
    return values[:1].tolist() * len(values) if (values == values[:1]).all() else values.tolist()


def _latency_factors(spread: float, seed: int) -> Iterator[float]:
    """Log-normal factors with median 1. `spread` is the standard deviation of their logarithm."""
    if not spread:
        yield from itertools.repeat(1.0)
    rng = np.random.default_rng(seed)
    while True:
        yield from np.exp(spread * rng.standard_normal(1024)).tolist()
