"""The paper's fault experiment on the real server: workers are killed one after another while traffic runs. No jax.

The engines are fake ones that take the profiled time; what is real is the server, which finds out that a worker is gone by its
batch that fails, gives that back, and goes on with the others. The same traffic and the same deaths are simulated beside it.
"""

import dataclasses
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import loadgen
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.profile import Profile
from superserve_jax.serving.server import Server
from superserve_jax.simulation import metrics, simulator
from superserve_jax.simulation.metrics import ReplaySummary
from superserve_jax.simulation.simulator import Cluster, Outage, SimulationResult
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet


class Mortal:
    """An `on_run` hook that takes as long as the profile says and that can be killed, in the middle of a batch, too.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> hook = Mortal(profile)
    >>> hook(profile.rows[0].subnet, 1, [])
    >>> hook.kill()
    >>> hook(profile.rows[0].subnet, 1, [])
    Traceback (most recent call last):
      ...
    RuntimeError: killed
    """

    def __init__(self, profile: Profile):
        self._profile, self._killed = profile, threading.Event()

    def __call__(self, subnet: Subnet, batch_size: int, inputs: Sequence[np.ndarray]) -> None:
        """Runs a batch. Raises RuntimeError where it is dead, or dies meanwhile."""
        if self._killed.wait(1e-3 * self._profile.latency_ms(subnet, batch_size)):
            raise RuntimeError("killed")

    def kill(self) -> None:
        """From now on, nothing runs any more."""
        self._killed.set()


@dataclasses.dataclass(frozen=True, eq=False)
class KillRun:
    """What became of the traffic, in reality and simulated.

    Args:
      done: each query on the real server.
      simulated: each query in the simulator, with `cluster`.
      cluster: the workers, with the times at which they were really killed.
      health: of the server at the end.
    """

    done: Replay
    simulated: SimulationResult
    cluster: Cluster
    health: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The queries that arrived between two deaths, while `workers` were alive: real figures and simulated ones."""

    from_s: float
    until_s: float
    workers: int
    real: ReplaySummary
    simulated: ReplaySummary


def run(trace: Trace, profile: Profile, policy: str, *, cluster: Cluster, slo_ms: float) -> KillRun:
    """Replays a trace on a server with one fake engine per worker, each killed when its outage in `cluster` begins."""
    hooks = [Mortal(profile) for _ in range(cluster.workers)]
    engines = [FakeEngine(profile, name=f"fake:{i}", speed=np.inf, on_run=hook) for i, hook in enumerate(hooks)]
    deaths: list[tuple[int, float]] = []  # worker, time.monotonic
    over = threading.Event()

    def kill() -> None:
        start_s = time.monotonic()
        for outage in sorted(cluster.outages, key=lambda o: o.from_s):
            if over.wait(max(start_s + outage.from_s - time.monotonic(), 0.0)):
                return
            hooks[outage.worker].kill()
            deaths.append((outage.worker, time.monotonic()))

    killer = threading.Thread(target=kill, name="superserve-killer", daemon=True)
    options = {"policy": policy, "slo_ms": slo_ms, "max_queue": len(trace) + 1}
    with Server.from_engines(engines, profile, max_failures=1, **options) as target:
        killer.start()
        done = loadgen.replay(target, trace, [np.float32(0)] * len(trace))
        over.set()
        killer.join()
        health = target.health()
        target.close(drain=False)
    outages = tuple(Outage(worker, max(at_s - done.start_s, 1e-3)) for worker, at_s in deaths)
    cluster = dataclasses.replace(cluster, outages=outages)
    return KillRun(done, simulator.simulate(profile, policy, trace, cluster=cluster), cluster, health)


def intervals(run: KillRun) -> list[Interval]:
    """The run from death to death; the last element is all of it, with the workers that are left. Intervals in which nothing
    arrived are left out."""
    done, again = run.done, run.simulated
    end_s = float(done.arrival_s[-1])
    edges = [0.0, *sorted(o.from_s for o in run.cluster.outages), np.nextafter(end_s, np.inf)]
    spans = [(a, b, run.cluster.workers - i) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    found = []
    for from_s, until_s, workers in [*spans, (0.0, edges[-1], spans[-1][2])]:
        of = (done.arrival_s >= from_s) & (done.arrival_s < until_s)
        if of.any():
            real, simulated = (
                metrics.summary(r.arrival_s[of], r.deadline_s[of], r.finish_s[of], r.accuracy[of]) for r in (done, again)
            )
            found.append(Interval(from_s, float(until_s), workers, real, simulated))
    return found


def table(found: Sequence[Interval]) -> list[tuple[str, ...]]:
    """Header and one row per interval: the real server and the simulator."""
    header = ("seconds", "workers", "queries", "SLO attainment", "accuracy, profiled", "p99 ms")
    rows = [
        (
            f"{i.from_s:.1f} to {i.until_s:.1f}",
            str(i.workers),
            f"{i.real.queries:,}",
            f"{i.real.attainment:.5f} / {i.simulated.attainment:.5f}",
            f"{100 * i.real.accuracy:.2f} / {100 * i.simulated.accuracy:.2f} %",
            f"{i.real.p99_ms:.1f} / {i.simulated.p99_ms:.1f}",
        )
        for i in found
    ]
    return [header, *rows]
