"""Repeats a replay of the real server in the simulator: as the machine was, or with workers that are killed. No jax.

**The same conditions.** The simulator knows the profile. A machine under load is slower than its profile and sometimes stops,
and its load generator is late. To make both comparable, `simulate_again` gives the simulator exactly these measurements:
- when each query was really submitted, and the time from then to its deadline;
- from a `Stopwatch`: by how much batches exceeded their profiled latency (mean and spread), and the time between two batches
  of a busy worker;
- the intervals in which the process stopped, from `heartbeat`.
The remaining difference is due to the server: its queue, its decisions, its threads.

**Killed workers.** `run_with_kills` is the paper's fault-tolerance experiment: workers are killed one by one while traffic
runs. The engines are fake and take the profiled time. The server is real: it notices a killed worker by its failed batch,
returns the queries of that batch to the queue, and goes on with the other workers.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine, Wrapper
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.lengths import length_bucket
from superserve_jax.loadtest import loadgen
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Policy
from superserve_jax.serving.server import Server
from superserve_jax.simulation import simulator
from superserve_jax.simulation.cluster import Cluster, Outage, Stall
from superserve_jax.simulation.metrics import ReplaySummary
from superserve_jax.simulation.simulator import SimulationResult
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

_BEAT_S = 1e-3
_LATE = 3  # a wake-up after more than this many beats is a stall


class Stopwatch(Wrapper):
    """Wraps an engine, and notes when each of its batches begins and ends.

    Attributes:
      batches: (start_s, end_s, profiled_ms, number of queries) of each batch, on the clock `time.monotonic`.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.profile import Profile, Row
    >>> from superserve_jax.subnet import Subnet
    >>> row = Row(Subnet((1,)), 0.7, (1.0, 1.5))
    >>> profile = Profile((1, 2), (row,))
    >>> watch = Stopwatch(FakeEngine(profile), profile)
    >>> watch.run(row.subnet, 2, [np.float32(5)])
    [(5.0, 0)]
    >>> [(start_s, end_s, profiled_ms, count)] = watch.batches
    >>> 1e3 * (end_s - start_s) > profiled_ms, profiled_ms, count
    (True, 1.5, 1)
    """

    def __init__(self, inner: Engine, profile: Profile):
        super().__init__(inner)
        self.batches: list[tuple[float, float, float, int]] = []
        self._profile = profile

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `engines.base.Engine.run`."""
        start_s = time.monotonic()
        outputs = super().run(subnet, batch_size, inputs)
        end_s = time.monotonic()
        table = self._profile.at_length(length_bucket(self.lengths, inputs)) if self.lengths else self._profile
        self.batches.append((start_s, end_s, table.latency_ms(subnet, batch_size), len(inputs)))
        return outputs


@contextlib.contextmanager
def heartbeat(beat_s: float = _BEAT_S) -> Iterator[list[tuple[float, float]]]:
    """While open, a thread wakes up every `beat_s`. Late wake-ups count as stalls: (start, end) on `time.monotonic`.

    A wake-up is late if it comes after more than three beats.

    >>> with heartbeat() as stalls_s:
    ...     time.sleep(0.01)
    >>> all(until_s > from_s for from_s, until_s in stalls_s)
    True
    """
    stalls_s: list[tuple[float, float]] = []
    stop = threading.Event()

    def beat() -> None:
        before_s = time.monotonic()
        while not stop.is_set():
            time.sleep(beat_s)
            now_s = time.monotonic()
            if now_s - before_s > _LATE * beat_s:
                stalls_s.append((before_s + beat_s, now_s))
            before_s = now_s

    thread = threading.Thread(target=beat, name="superserve-heartbeat", daemon=True)
    thread.start()
    try:
        yield stalls_s
    finally:
        stop.set()
        thread.join()


def during(done: Replay, stalls_s: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The parts of stalls that lie between the start of a replay and its last deadline.

    A heartbeat also notes stalls while the server starts and closes, and while the answers are evaluated.

    >>> done = Replay(np.zeros(1), np.array([2.0]), *[np.zeros(1)] * 5, start_s=10.0)
    >>> during(done, [(8.0, 9.0), (9.0, 10.5), (11.0, 11.1), (11.9, 13.0)])
    [(10.0, 10.5), (11.0, 11.1), (11.9, 12.0)]
    """
    start_s, end_s = done.start_s, done.start_s + float(done.deadline_s.max())
    return [(max(a, start_s), min(b, end_s)) for a, b in stalls_s if a < end_s and b > start_s]


@dataclasses.dataclass(frozen=True)
class Machine:
    """The behaviour of a machine, as measured during a replay.

    Args:
      overhead_ms: the mean time by which batches exceeded their profiled latency, plus the median time between two batches.
      noise: the spread of latencies: half the distance of the 16th and 84th percentile of log(latency / profiled latency).
      stalls: the intervals in which the process stopped, in seconds of the trace.
    """

    overhead_ms: float
    noise: float
    stalls: tuple[Stall, ...]

    @property
    def stalled_s(self) -> float:
        """The total length of the stalls."""
        return sum(s.until_s - s.from_s for s in self.stalls)


def measured_machine(done: Replay, watches: Sequence[Stopwatch], stalls_s: Sequence[tuple[float, float]]) -> Machine:
    """Computes the behaviour of a machine from what the watches and the heartbeat noted during a replay.

    Batches that ended in a stall do not count towards the overhead: the simulation contains the stall itself.

    Args:
      done: the replay.
      watches: the engines of the replay, one per worker.
      stalls_s: the stalls that a `heartbeat` noted during the replay.
    """
    shifted = [(max(a - done.start_s, 0.0), b - done.start_s) for a, b in stalls_s]
    stalls = tuple(Stall(a, b) for a, b in shifted if b > a)
    batches = sorted((*batch, worker) for worker, watch in enumerate(watches) for batch in watch.batches)
    if not batches:
        return Machine(0.0, 0.0, stalls)
    start_s, end_s, profiled_ms, *_ = np.array(batches).T
    edges_s = np.array([[s.from_s, s.until_s + _BEAT_S] for s in stalls]).reshape(-1, 2) + done.start_s
    in_stall = np.searchsorted(edges_s[:, 0], end_s, "right") > np.searchsorted(edges_s[:, 1], end_s, "right")
    took_ms = 1e3 * (end_s - start_s)
    calm = ~in_stall if not in_stall.all() else in_stall
    low, high = np.percentile(np.log(took_ms[calm] / profiled_ms[calm]), [16, 84])
    noise = float(high - low) / 2
    extra_ms = float((took_ms[calm] - np.exp(noise**2 / 2) * profiled_ms[calm]).mean())
    return Machine(max(extra_ms, 0.0) + _turn_ms(done, batches), noise, stalls)


def _turn_ms(done: Replay, batches: Sequence[tuple[float, float, float, int, int]]) -> float:
    """Median time between two batches of a busy worker, for the answers to the first and the decision on the second.

    A worker is busy if queries wait when its batch ends. To know this, the function assumes that batches, by start time, take
    queries in the order of arrival. This is exact with one SLO and one length bucket, and nearly so with more length buckets.
    """
    submitted_s = np.sort(done.start_s + _submitted_s(done))
    free_s: dict[int, float] = {}  # when the last batch of each worker ended
    taken, turns_s = 0, []
    for start_s, end_s, _, count, worker in batches:
        if worker in free_s and taken < len(submitted_s) and submitted_s[taken] < free_s[worker]:
            turns_s.append(start_s - free_s[worker])
        free_s[worker] = end_s
        taken += count
    return 1e3 * float(np.median(turns_s)) if turns_s else 0.0


def simulate_again(
    done: Replay, profile: Profile | Sequence[Profile], policy: str | Policy, *, workers: int, machine: Machine
) -> SimulationResult:
    """Simulates a replay on a machine like the measured one. Raises DataError if the replay has no queries."""
    if not len(done.arrival_s):
        raise errors.DataError("the replay has no queries, so there is nothing to simulate; replay a trace with queries")
    submitted_s = _submitted_s(done)
    order = np.argsort(submitted_s, kind="stable")
    left_ms = np.maximum(1e3 * (done.deadline_s - submitted_s), 1e-3)
    floors, lengths = (np.broadcast_to(values, len(order))[order] for values in (done.floors, done.lengths))
    trace = Trace(submitted_s[order], left_ms[order], floors, lengths=lengths)
    cluster = Cluster(workers, machine.overhead_ms, machine.noise, stalls=machine.stalls)
    return simulator.simulate(profile, policy, trace, cluster=cluster)


def _submitted_s(done: Replay) -> np.ndarray:
    """When each query was submitted. A refused query counts as submitted at its deadline, so it misses the deadline."""
    return np.minimum(done.arrival_s + done.lateness_s, done.deadline_s)


# -- workers are killed -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class KillRun:
    """The outcome of the experiment.

    Args:
      real: every query on the real server.
      simulated: every query in the simulator, on `cluster`.
      cluster: the workers, with the times at which they were really killed.
      health: the server's health at the end.
    """

    real: Replay
    simulated: SimulationResult
    cluster: Cluster
    health: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The queries that arrived between two kills, while `workers` were alive: real and simulated metrics."""

    from_s: float
    until_s: float
    workers: int
    real: ReplaySummary
    simulated: ReplaySummary


def run_with_kills(trace: Trace, profile: Profile, policy: str, *, cluster: Cluster, slo_ms: float) -> KillRun:
    """Replays a trace on a server with one fake engine per worker of `cluster`. Kills each worker when its outage begins."""
    killed = [threading.Event() for _ in range(cluster.workers)]
    engines = [
        FakeEngine(profile, name=f"fake:{i}", speed=np.inf, on_run=functools.partial(_takes_time, profile, event))
        for i, event in enumerate(killed)
    ]
    kills: list[tuple[int, float]] = []  # worker, time.monotonic

    def kill(worker: int) -> None:
        killed[worker].set()
        kills.append((worker, time.monotonic()))

    timers = [threading.Timer(outage.from_s, kill, (outage.worker,)) for outage in cluster.outages]
    options = {"policy": policy, "slo_ms": slo_ms, "max_queue": len(trace) + 1, "max_failures": 1}
    with Server.from_engines(engines, profile, **options) as target, contextlib.ExitStack() as stack:
        for timer in timers:
            timer.start()
            stack.callback(timer.cancel)
        real = loadgen.replay(target, trace, [np.float32(0)] * len(trace))
        health = target.health()
        target.close(drain=False)
    outages = tuple(Outage(worker, max(at_s - real.start_s, 1e-3)) for worker, at_s in kills)
    cluster = dataclasses.replace(cluster, outages=outages)
    return KillRun(real, simulator.simulate(profile, policy, trace, cluster=cluster), cluster, health)


def _takes_time(profile: Profile, killed: threading.Event, subnet: Subnet, batch_size: int, _: Any) -> None:
    """A hook of an engine: sleeps for the profiled time of a batch, and raises as soon as the worker is killed."""
    if killed.wait(1e-3 * profile.latency_ms(subnet, batch_size)):
        raise RuntimeError("killed")


def intervals(run: KillRun) -> list[Interval]:
    """Metrics of the run between the kills, and last of the whole run. Intervals without arrivals are left out."""
    arrival_s = run.real.arrival_s
    edges = [0.0, *sorted(o.from_s for o in run.cluster.outages), float(np.nextafter(arrival_s[-1], np.inf))]
    spans = [(a, b, run.cluster.workers - i) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    found = []
    for from_s, until_s, workers in [*spans, (0.0, edges[-1], spans[-1][2])]:
        which = (arrival_s >= from_s) & (arrival_s < until_s)
        if which.any():
            real, simulated = (loadgen.summarize(r, which) for r in (run.real, run.simulated))
            found.append(Interval(from_s, until_s, workers, real, simulated))
    return found
