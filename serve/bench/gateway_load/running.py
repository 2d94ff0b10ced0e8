"""Runs one case: starts its server, plays its traffic, and takes the figures. Repeats it until enough runs count."""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gateway_load import cases, children, http1, http2, messages, open_loop, peers
from gateway_load.cases import IN_PROCESS, SIMULATED, Case
from gateway_load.children import Child, CpuTimes
from gateway_load.messages import Answer
from gateway_load.open_loop import Connections
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.paper_profile import paper_profile
from superserve_jax.simulation.simulator import simulate
from superserve_jax.simulation.traces import Trace

OTHER_CORES, LATENESS_MS = 0.15, 1.0
"""A run counts if other programs used at most so many cores, and the generator was at most so late at p99."""
_INPUTS = {"number": messages.SMALL, "image": messages.IMAGE}
_PATIENCE_S = 10.0
WARM_UP_S = np.linspace(0, 0.5, 200)
"""When the requests before a measurement are due."""
MEDIANS = ("attainment", "accuracy", "p50_ms", "p99_ms", "server_us", "generator_us", "lateness_p99_ms", "other_cores")
Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """How cases are run.

    Args:
      seconds: the length of bursty traffic.
      bursts_s: the length of traffic with bursts.
      connections: connections of HTTP/1.1 to open.
      grpc_connections: connections of HTTP/2 to open.
      peer_batches: the largest batch of peers, by subnet.
      peer_wait_ms: how long peers wait for a full batch.
      peer_python: the interpreter of the peers' environment.
      seed: the seed of the first run's arrivals.
    """

    seconds: float
    bursts_s: float
    connections: int
    grpc_connections: int
    peer_batches: Sequence[int]
    peer_wait_ms: int
    peer_python: pathlib.Path
    seed: int


def run(case: Case, setup: Setup, number: int) -> Run:
    """Runs a case once. The number of the run determines the arrivals."""
    trace = case.trace(seconds=setup.seconds if case.qps else setup.bursts_s, seed=setup.seed + number)
    if case.server == SIMULATED:
        return simulated(case, trace)
    given = _INPUTS[case.given]
    only = [] if case.subnet is None else ["--subnet", case.subnet]
    arguments = [*only, "--shape", *given.shape, "--dtype", given.dtype, "--slo-ms", cases.SLO_MS]
    if case.server == IN_PROCESS:
        return in_process(trace.arrivals_s, arguments)
    if case.is_peer:
        return of_peer(case, setup, trace.arrivals_s)
    form = "grpc" if case.server == "gRPC" else case.wire
    requests = [messages.REQUESTS[form](given, i, cases.SLO_MS) for i in range(messages.NUMBERS)]
    with children.started("child.py", *arguments, *(["--grpc"] if form == "grpc" else [])) as child:
        ports = child.printed()
        if form == "grpc":
            connect = functools.partial(http2.Http2, ports["grpc_port"], connections=setup.grpc_connections)
        else:
            connect = functools.partial(http1.Http1, ports["port"], connections=setup.connections)
        return loaded(child, connect, trace.arrivals_s, requests, messages.READERS[form])


def of_peer(case: Case, setup: Setup, due_s: np.ndarray) -> Run:
    """Runs a case of a peer, which serves one subnet."""
    assert case.subnet is not None
    batch, path = setup.peer_batches[case.subnet], peers.PEERS[case.server].path
    requests = [messages.peer_request(path, i) for i in range(messages.NUMBERS)]
    options: dict[str, Any] = {"batch": batch, "wait_ms": setup.peer_wait_ms, "python": setup.peer_python}
    with peers.started(case.server, case.subnet, **options) as (child, port):
        connect = functools.partial(http1.Http1, port, connections=setup.connections)
        found = loaded(child, connect, due_s, requests, messages.read_peer)
    return found | {"batch": batch, "accuracy": paper_profile().rows[case.subnet].accuracy}


def loaded(
    child: Child,
    connect: Callable[..., Connections],
    due_s: np.ndarray,
    requests: Sequence[bytes],
    read: Callable[[bytes], Answer],
) -> Run:
    """Plays a trace on a server, after a moment of other requests, and returns the figures."""
    started = list[CpuTimes]()
    open_loop.play(connect, WARM_UP_S, requests, patience_s=_PATIENCE_S)
    note = lambda: started.append(CpuTimes.now(child))  # noqa: E731
    played = open_loop.play(connect, due_s, requests, patience_s=_PATIENCE_S, on_start=note)
    used = CpuTimes.now(child).since(started[0], len(due_s))
    return open_loop.figures(played, cases.SLO_MS, read, messages.NUMBERS) | used


def in_process(due_s: np.ndarray, arguments: Sequence[Any]) -> Run:
    """Replays a trace without a network. The CPU time of the server is not told apart from the generator's."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.npy"
        np.save(path, due_s)
        with children.started("child.py", *arguments, "--trace", path) as child:
            return child.printed()


def simulated(case: Case, trace: Trace) -> Run:
    """Simulates a case with four engines: the figures of a server and a network that take no time."""
    profile = paper_profile()
    if case.subnet is not None:
        profile = dataclasses.replace(profile, rows=(profile.rows[case.subnet],))
    found = simulate(profile, "slackfit", trace, cluster=Cluster(workers=peers.WORKERS))
    latency_ms = 1e3 * (found.finish_s - trace.arrivals_s)
    return {
        "queries": len(trace),
        "attainment": found.attainment,
        "accuracy": found.mean_accuracy,
        "p50_ms": float(np.median(latency_ms)),
        "p99_ms": float(np.percentile(latency_ms, 99)),
        "lateness_p99_ms": 0.0,
        "other_cores": 0.0,
    }


def counts(found: Mapping[str, Any]) -> bool:
    """Whether a run was undisturbed, so that it counts."""
    late_ms = found["lateness_p99_ms"] - found.get("period_ms", 0.0)
    return found["other_cores"] <= OTHER_CORES and late_ms <= LATENESS_MS


def result(runs: Sequence[Run], repeats: int) -> Run:
    """The medians over the first `repeats` runs that count; if there are fewer, over the least disturbed ones of all.

    Sums of wrong and lost answers are over all runs.
    """
    counted = [found for found in runs if counts(found)][:repeats]
    enough = len(counted) >= repeats
    chosen = counted if enough else sorted(runs, key=lambda found: found["other_cores"])[:repeats]
    medians = {name: statistics.median(found[name] for found in chosen) for name in MEDIANS if name in chosen[0]}
    sums = {name: sum(found.get(name, 0) for found in runs) for name in ("wrong", "lost")}
    return {**medians, **sums, "runs": len(runs), "counted": len(counted), "quiet": enough}
