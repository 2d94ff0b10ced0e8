"""The paper's fault-tolerance experiment on the real server: workers are killed one by one while traffic runs. No jax.

The engines are fake and take the profiled time. The server is real: it notices a killed worker by its failed batch, returns
the queries of that batch to the queue, and goes on with the other workers. The simulator repeats the same traffic and kills.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from typing import Any

import numpy as np

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import loadgen
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.profile import Profile
from superserve_jax.serving.server import Server
from superserve_jax.simulation import simulator
from superserve_jax.simulation.metrics import ReplaySummary
from superserve_jax.simulation.simulator import Cluster, Outage, SimulationResult
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet


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


def run(trace: Trace, profile: Profile, policy: str, *, cluster: Cluster, slo_ms: float) -> KillRun:
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
