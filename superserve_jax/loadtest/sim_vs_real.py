"""A replay on the real server once more in the simulator, under what was measured of the machine. No jax.

The simulator knows the profile; a machine under load is slower than that, stands still now and then, and its load generator is
late. So that the two can be compared, `again` gives the simulator what was measured of them, and nothing else:
- the times at which the queries were really submitted, with the deadlines that they really had;
- by how much batches took longer than the profile says, as mean and spread, and the time between two batches of a worker that
  did not have to wait for a query, as `Stopwatch` saw them;
- the times at which the process stood still, as `Heartbeat` saw them.
What remains between the two is the server: its queue, its decisions, its threads.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine, Wrapper
from superserve_jax.lengths import length_bucket
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Policy
from superserve_jax.simulation import simulator
from superserve_jax.simulation.simulator import Cluster, SimulationResult, Stall
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

_BEAT_S = 1e-3
_STALL_S = 3e-3  # a beat that comes later than this is a stall


class Stopwatch(Wrapper):
    """An engine that notes when each batch of another engine begins and ends.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.profile import Profile, Row
    >>> from superserve_jax.subnet import Subnet
    >>> row = Row(Subnet((1,)), 0.7, (1.0, 1.5))
    >>> table = Profile((1, 2), (row,))
    >>> watch = Stopwatch(FakeEngine(table), table)
    >>> watch.run(row.subnet, 2, [np.float32(5)])
    [(5.0, 0)]
    >>> [(start_s, end_s, profiled_ms, count)] = watch.batches
    >>> 1e3 * (end_s - start_s) > profiled_ms, profiled_ms, count
    (True, 1.5, 1)
    """

    def __init__(self, watched: Engine, profile: Profile):
        super().__init__(watched)
        self.batches: list[tuple[float, float, float, int]] = []  # start and end on time.monotonic, profiled ms, queries
        self._profile = profile

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `engine.Engine.run`."""
        start_s = time.monotonic()
        outputs = super().run(subnet, batch_size, inputs)
        end_s = time.monotonic()
        table = self._profile.at_length(length_bucket(self.lengths, inputs)) if self.lengths else self._profile
        self.batches.append((start_s, end_s, table.latency_ms(subnet, batch_size), len(inputs)))
        return outputs


class Heartbeat:
    """While open, a thread that wakes up every millisecond and notes when it could not.

    >>> with Heartbeat() as heart:
    ...     time.sleep(0.01)
    >>> all(until_s > from_s for from_s, until_s in heart.stalls_s)
    True
    """

    def __init__(self):
        self.stalls_s: list[tuple[float, float]] = []  # on the clock time.monotonic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="superserve-heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        before_s = time.monotonic()
        while not self._stop.is_set():
            time.sleep(_BEAT_S)
            now_s = time.monotonic()
            if now_s - before_s > _STALL_S:
                self.stalls_s.append((before_s + _BEAT_S, now_s))
            before_s = now_s


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was measured of a machine during a replay.

    Args:
      overhead_ms: mean of what a batch cost beyond its profiled latency, the time between two batches included.
      noise: spread of the latencies, as the standard deviation of their logarithm, without the tails.
      stalls: times at which it stood still, in seconds of the trace.
    """

    overhead_ms: float
    noise: float
    stalls: tuple[Stall, ...]

    @property
    def stalled_s(self) -> float:
        """Their sum."""
        return sum(s.until_s - s.from_s for s in self.stalls)


def machine(done: Replay, watches: Sequence[Stopwatch], heart: Heartbeat) -> Machine:
    """What was seen of the machine while `done` was replayed on the engines `watches`, one per worker.

    Batches that ended in a stall are left out of the overhead: the stall itself is in the simulation.
    """
    shifted = [(max(a - done.start_s, 0.0), b - done.start_s) for a, b in heart.stalls_s]
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
    """Median time between two batches of a worker for which queries waited: to answer one, and to decide on the other.

    With one SLO the batches, in the order of their beginnings, take the queries in the order of their arrival; with several
    length buckets nearly so.
    """
    submitted_s = np.sort(done.start_s + _submitted_s(done))
    left_s: dict[int, float] = {}
    taken, turns_s = 0, []
    for start_s, end_s, _, count, worker in batches:
        if worker in left_s and taken < len(submitted_s) and submitted_s[taken] < left_s[worker]:
            turns_s.append(start_s - left_s[worker])
        left_s[worker] = end_s
        taken += count
    return 1e3 * float(np.median(turns_s)) if turns_s else 0.0


def again(
    done: Replay,
    profile: Profile | Sequence[Profile],
    policy: str | Policy,
    *,
    workers: int,
    machine: Machine,
) -> SimulationResult:
    """The simulator's account of a replay on such a machine. Raises DataError where it holds no query."""
    if not len(done.arrival_s):
        raise errors.DataError("the replay holds no query; there is nothing to simulate")
    submitted_s = _submitted_s(done)
    order = np.argsort(submitted_s, kind="stable")
    left_ms = np.maximum(1e3 * (done.deadline_s - submitted_s)[order], 1e-3)
    cluster = Cluster(workers, machine.overhead_ms, machine.noise, stalls=machine.stalls)
    tokens = done.lengths[order] if isinstance(done.lengths, np.ndarray) else done.lengths
    floors = done.floors[order] if isinstance(done.floors, np.ndarray) else done.floors
    trace = Trace(submitted_s[order], left_ms, floors, lengths=tokens)
    return simulator.simulate(profile, policy, trace, cluster=cluster)


def _submitted_s(done: Replay) -> np.ndarray:
    """When each query was submitted; one that never was arrives at its deadline, and is missed."""
    return np.minimum(done.arrival_s + np.where(np.isfinite(done.lateness_s), done.lateness_s, np.inf), done.deadline_s)
