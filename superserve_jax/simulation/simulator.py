"""The simulator: a server on a virtual clock, with latencies read from a profile. No jax.

It runs the server's own queue, `dispatch`, `admission`, `speeds` and policies. Only time is simulated: a batch takes its
profiled latency, and the clock jumps from one event to the next. So a minute of traffic takes about a second.

This is one file because a run reads all of `Cluster` and fills all of `SimulationResult`.

An event is an arrival, the end of a batch, or a planned failure. `_Simulation.run` is the loop over the events:

    1. Jump to the next event. While all workers are busy, arrivals are no events: nothing happens to them before a batch ends.
    2. Put the queries that have arrived by now into the queue.
    3. Handle all events that are due by now: batches that end, workers that leave or return, stalls.
    4. While a worker is idle and a query waits, dispatch a batch. Its end is a new event.
"""

import bisect
import collections
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
from superserve_jax.simulation.traces import Trace

MET, LATE, EXPIRED, REFUSED = range(4)
"""Outcomes of a query: answered by its deadline, answered later, given up without an answer, refused on arrival."""


class Outage(NamedTuple):
    """A worker is gone from `from_s` to `until_s`. Its running batch goes back to the queue."""

    worker: int
    from_s: float
    until_s: float = math.inf


class Stall(NamedTuple):
    """The whole server is stopped. Nothing is dispatched, and batches that end meanwhile are answered at `until_s`."""

    from_s: float
    until_s: float


class Slowdown(NamedTuple):
    """Batches that start between `from_s` and `until_s` take `factor` times as long. `worker` None means all workers."""

    factor: float
    from_s: float
    until_s: float = math.inf
    worker: int | None = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The simulated server: its workers, its options, and its planned failures.

    Args:
      workers: number of workers.
      overhead_ms: time added to the latency of every batch. The policy does not see it.
      noise: standard deviation of the logarithm of the latencies.
      actuation_ms: time added to a batch whose subnet differs from the worker's last one, as in a server that loads models.
      max_queue: number of waiting queries from which on new queries are refused.
      expire: whether to give up a query that would be late even alone on the fastest subnet. If False, it is served late.
      admission: whether to refuse a query on arrival if its deadline cannot be met (see `scheduling.admission`).
      outages: the workers that leave, when they leave, and when they return.
      stalls: the times at which the whole server is stopped.
      slowdowns: the times at which workers are slower than their profile.
      follow_drift: whether to correct the policy's state for workers that run slower than their profile (see
        `scheduling.speeds`).
    """

    workers: int = 8
    overhead_ms: float = 0.0
    noise: float = 0.0
    actuation_ms: float = 0.0
    max_queue: float = math.inf
    expire: bool = False
    admission: bool = False
    outages: tuple[Outage, ...] = ()
    stalls: tuple[Stall, ...] = ()
    slowdowns: tuple[Slowdown, ...] = ()
    follow_drift: bool = True

    def __post_init__(self):
        if self.workers < 1:
            raise errors.ConfigError(f"workers must be 1 or more, got {self.workers}")
        for name in ("overhead_ms", "noise", "actuation_ms", "max_queue"):
            if not getattr(self, name) >= 0:
                raise errors.ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        workers = range(self.workers)
        wrong = [
            *(event for event in (*self.outages, *self.stalls, *self.slowdowns) if not 0 <= event.from_s < event.until_s),
            *(outage for outage in self.outages if outage.worker not in workers),
            *(stall for stall in self.stalls if stall.until_s == math.inf),
            *(slow for slow in self.slowdowns if slow.worker not in (None, *workers) or not 0 < slow.factor < math.inf),
        ]
        if wrong:
            raise errors.ConfigError(
                f"{wrong[0]} is impossible: it must begin before it ends, on a worker from 0 to {self.workers - 1}; "
                "a stall must end, and a slowdown needs a positive and finite factor"
            )


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
    cluster = cluster or Cluster()
    profiles = profiles_of_workers(profile, cluster.workers)
    made, own = policies.create(policy, *profiles), callable(policy) or policies.is_custom(policy)
    with patience.Patience(stall_s if own else math.inf) as watch:
        return _Simulation(profiles, made, trace, cluster, seed, watch.decide if own else dispatch.decide).result()


class _Batch(NamedTuple):
    """A running batch."""

    worker: int
    queries: list[int]
    start_s: float
    accuracy: float
    profiled_ms: float
    actuation_ms: float


class _Simulation:
    """The state of one run. An event is a heap entry (time, number, method, argument). Unique numbers break ties."""

    def __init__(
        self, profiles: list[Profile], policy: Policy, trace: Trace, cluster: Cluster, seed: int, decide: dispatch.Decide
    ):
        self.profiles, self.policy, self.trace, self.cluster, self.decide = profiles, policy, trace, cluster, decide
        profile = profiles[0]  # all profiles have the same batch sizes and lengths
        self.fleet = Fleet(profiles, correct=cluster.follow_drift)
        self.factors = _latency_factors(cluster.noise, seed)
        self.padded = [profile.batch_index(n) for n in range(profile.max_batch + 1)]
        self.fastest_s = 1e-3 * min(p.at_length(0).fastest().latency_ms[0] for p in profiles)
        self.arrivals: list[float] = [*trace.arrivals_s.tolist(), math.inf]
        self.deadlines: list[float] = trace.deadlines_s.tolist()
        best = min(p.rows[-1].accuracy for p in profiles)
        if np.any(np.greater(trace.floors, best)):
            raise errors.AccuracyFloorError(f"a floor of {np.max(trace.floors)} is above the best subnet's {best}; lower it")
        self.floors: list[float] = np.broadcast_to(trace.floors, trace.arrivals_s.shape).tolist()
        if profile.lengths and np.any(np.greater(trace.lengths, profile.lengths[-1])):
            longest = profile.lengths[-1]
            raise errors.InputError(f"a query of {np.max(trace.lengths)} tokens, but the longest length bucket has {longest}")
        self.lengths: list[int] = np.broadcast_to(trace.lengths, trace.arrivals_s.shape).tolist()
        self.mixed = np.ndim(trace.slo_ms) > 0
        self.slo_ms: list[float] = np.atleast_1d(trace.slo_ms).tolist()
        self.arrived = 0
        self.queue = length_queue.make_queue(profile)
        self.meter = ArrivalMeter()
        self.admission = Admission(profile)

        self.idle = collections.deque(range(cluster.workers))
        self.running: list[_Batch | None] = [None] * cluster.workers
        self.last_subnet: list[Any] = [None] * cluster.workers
        self.outages = [0] * cluster.workers  # for each worker, the number of outages that it is in, since they may overlap
        self.stalled_until_s = 0.0
        # Finished batches as flat lists of numbers, which the garbage collector need not visit.
        self.answered: list[int] = []  # queries of all batches, one batch after another
        self.sizes: list[int] = []  # sizes of the batches
        self.batches: list[float] = []  # worker, start, finish and accuracy of each batch
        self.expired: list[int] = []
        self.refused: list[int] = []

        # Sentinels: the last arrival and the last event have time infinity.
        self.events: list[tuple[float, int, Callable[[float, Any], None], Any]] = [(math.inf, 0, self.stall, None)]
        self.numbers = itertools.count(1)
        for outage in cluster.outages:
            self.at(outage.from_s, self.leave, outage.worker)
            if outage.until_s < math.inf:
                self.at(outage.until_s, self.come_back, outage.worker)
        for stall in cluster.stalls:
            self.at(stall.from_s, self.stall, stall.until_s)

    def run(self) -> None:
        arrivals, events, waiting, idle = self.arrivals, self.events, self.queue, self.idle
        while True:
            now_s = events[0][0]
            if idle and arrivals[self.arrived] < now_s:
                now_s = min(now_s, max(arrivals[self.arrived], self.stalled_until_s))
            if now_s == math.inf:
                break
            if arrivals[self.arrived] <= now_s:
                self.admit(now_s)
            while events[0][0] <= now_s:
                _, _, happens, argument = heapq.heappop(events)
                happens(now_s, argument)
            if now_s >= self.stalled_until_s:
                while idle and len(waiting):
                    self.dispatch(now_s)
        # No event is left: all queries are answered, or all workers have left for good.
        events.clear()  # events refer to methods of this object; without this reference cycle it is freed at once
        self.expired += waiting.drain()
        self.refused += range(self.arrived, len(arrivals) - 1)

    def at(self, time_s: float, happens: Callable[[float, Any], None], argument: Any) -> None:
        heapq.heappush(self.events, (time_s, next(self.numbers), happens, argument))

    def admit(self, now_s: float) -> None:
        """Put the queries that have arrived by now into the queue, or refuse them."""
        first = self.arrived
        self.arrived = end = bisect.bisect_right(self.arrivals, now_s, first)
        if self.cluster.max_queue < math.inf:
            admitted = min(end, first + max(int(self.cluster.max_queue) - len(self.queue), 0))
            self.refused += range(admitted, end)
            end = admitted
        push, deadlines, floors, tokens = self.queue.push, self.deadlines, self.floors, self.lengths
        if first < end:
            self.meter.shorten(now_s, min(self.slo_ms[first:end]) if self.mixed else self.slo_ms[0])
        for i in range(first, end):
            if self.cluster.admission and not self.admits(i):
                self.refused.append(i)
            else:
                push(deadlines[i], i, floors[i], tokens[i])

    def admits(self, i: int) -> bool:
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

    def dispatch(self, now_s: float) -> None:
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
        latency_ms = profiled_ms * next(self.factors) * self.slowdown(worker, now_s) + self.cluster.overhead_ms
        actuation_ms = 0.0
        if row.subnet != last:
            actuation_ms = self.cluster.actuation_ms
            self.last_subnet[worker] = row.subnet
        batch = _Batch(worker, queries, now_s, row.accuracy, profiled_ms, actuation_ms)
        self.running[worker] = batch
        self.at(now_s + 1e-3 * (latency_ms + actuation_ms), self.finish, batch)

    def slowdown(self, worker: int, now_s: float) -> float:
        """The factor on the latency of a batch that starts now."""
        slowdowns = self.cluster.slowdowns
        return math.prod([s.factor for s in slowdowns if s.worker in (None, worker) and s.from_s <= now_s < s.until_s])

    def finish(self, now_s: float, batch: _Batch) -> None:
        if self.running[batch.worker] is not batch:
            return  # the batch's worker left meanwhile
        if now_s < self.stalled_until_s:
            self.at(self.stalled_until_s, self.finish, batch)
            return
        self.running[batch.worker] = None
        self.fleet.observe(batch.worker, batch.profiled_ms, 1e3 * (now_s - batch.start_s) - batch.actuation_ms)
        self.idle.append(batch.worker)
        self.answered += batch.queries
        self.sizes.append(len(batch.queries))
        self.batches += (batch.worker, batch.start_s, now_s, batch.accuracy)

    def stall(self, now_s: float, until_s: float) -> None:
        self.stalled_until_s = max(self.stalled_until_s, until_s)
        self.at(until_s, lambda *_: None, None)  # an event that does nothing, so that the loop dispatches at `until_s`

    def leave(self, now_s: float, worker: int) -> None:
        self.outages[worker] += 1
        if self.outages[worker] > 1:
            return
        self.fleet.leave(worker)
        batch, self.running[worker], self.last_subnet[worker] = self.running[worker], None, None
        if batch is None:
            self.idle.remove(worker)
            return
        for i in batch.queries:  # as in the server, a query is not tried again after its deadline
            if self.deadlines[i] > now_s:
                self.queue.push(self.deadlines[i], i, self.floors[i], self.lengths[i])
            else:
                self.expired.append(i)

    def come_back(self, now_s: float, worker: int) -> None:
        self.outages[worker] -= 1
        if not self.outages[worker]:
            self.fleet.come_back(worker)
            self.idle.append(worker)

    def result(self) -> SimulationResult:
        self.run()
        n = len(self.trace)
        start_s, finish_s, accuracy = np.full(n, np.inf), np.full(n, np.inf), np.full(n, np.nan)
        batch, worker = np.zeros(n, np.int32), np.full(n, -1, np.int32)
        outcome = np.full(n, LATE, np.uint8)
        order, sizes = np.array(self.answered, np.int64), np.array(self.sizes, np.int64)
        batch[order] = np.repeat(sizes, sizes)
        columns = np.array(self.batches).reshape(-1, 4).T
        for array, column in zip((worker, start_s, finish_s, accuracy), columns, strict=True):
            array[order] = np.repeat(column, sizes)
        deadline_s = self.trace.deadlines_s
        outcome[finish_s <= deadline_s] = MET
        outcome[self.expired] = EXPIRED
        outcome[self.refused] = REFUSED
        return SimulationResult(self.trace.arrivals_s, deadline_s, start_s, finish_s, accuracy, batch, worker, outcome)


def _latency_factors(spread: float, seed: int) -> Iterator[float]:
    """Log-normal factors with median 1. `spread` is the standard deviation of their logarithm."""
    if not spread:
        yield from itertools.repeat(1.0)
    rng = np.random.default_rng(seed)
    while True:
        yield from np.exp(spread * rng.standard_normal(1024)).tolist()
