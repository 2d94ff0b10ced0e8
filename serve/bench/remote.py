"""Measures workers in processes of Ray against workers in this process, and what happens when a process or a host is lost.

One file because the parts share engines, traffic and tables.

    python serve/bench/remote.py
    python serve/bench/remote.py --parts faults --plot runs/remote.png
    python serve/bench/remote.py --parts host

All engines sleep as long as `simulation.paper_profile` says. It recalls the paper's GPUs: from memory, unverified, about twice
the paper's throughput. An input has 1 KB. So the figures are about the calls to the processes, and not about a model.

| part | what it does |
|---|---|
| throughput | the queue is always full, and every batch is full: 16 queries on the fastest subnet, 7.4 ms |
| load | queries arrive at half of that rate, with a deadline of 36 ms and the default policy |
| faults | the same at 0.4 of that rate; one of 4 processes is killed (SIGKILL) or stopped for 2 s (SIGSTOP) |
| host | as before; a host with 2 of 4 processes is gone, and another one has room for them |

Local and remote runs alternate, and the ratios are medians. The CPU time of the router is that of this process. In the part
throughput, all queries have been submitted before. Hosts are simulated by several raylets on this machine.
Library: remote, serving.server, loadtest.loadgen, simulation.traces, simulation.paper_profile, plots.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

import superserve_jax as ss
from superserve_jax import cli, plots
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.loadtest import loadgen
from superserve_jax.profile import Profile
from superserve_jax.remote import RayDevice
from superserve_jax.serving import makers
from superserve_jax.simulation import traces
from superserve_jax.simulation.paper_profile import paper_profile

SHAPE, SLO_MS = (1024,), 36.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
WARM_UP_S = 1.0
FAULT_AT = 0.3  # the share of the time after which a fault happens
WORST = ("failed", "unanswered")
HOST_S = 60.0  # the longest time in which a host's workers may come back


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      parts: what to measure.
      actors: the numbers of workers of the part throughput. The other parts take four.
      repeats: how often each measurement is repeated.
      seconds: the length of one measurement.
      seed: the seed of the arrivals.
      json: write the figures to this file.
      plot: write a plot of the first fault over time to this file.
    """

    parts: tuple[Literal["throughput", "load", "faults", "host"], ...] = ("throughput", "load", "faults", "host")
    actors: tuple[int, ...] = (2, 4)
    repeats: int = 5
    seconds: float = 10.0
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "repeats", "seconds")


class Sleeping(NamedTuple):
    """What a process makes a sleeping engine from, see `serving.makers.Source`."""

    speed: float = 1.0

    def at(self, _: Profile) -> "Sleeping":
        """The engine has the sizes of every profile."""
        return self

    def fits(self, made: "Sleeping", _: Profile) -> bool:
        """Whether an engine that was made from `made` is the same."""
        return self == made

    def open(self) -> tuple[FakeDevice, Profile]:
        """The engine, and its profile."""
        profile = paper_profile()
        return FakeDevice(profile, input_shape=SHAPE, input_dtype=np.uint8, speed=self.speed), profile


def rate_qps(workers: int, load: float) -> float:
    """`load` times what full batches on the fastest subnet carry."""
    profile = paper_profile()
    return load * workers * profile.max_batch / (1e-3 * profile.fastest().latency_ms[-1])


@contextlib.contextmanager
def serving(devices: list[RayDevice] | int, **options: Any) -> Iterator[ss.Server]:
    """A server on processes of Ray, or on so many engines of this process."""
    if isinstance(devices, int):
        engines, profiles = zip(*(Sleeping().open() for _ in range(devices)), strict=True)
    else:
        engines, profiles = makers.make_all(devices, Sleeping())  # type: ignore[arg-type]
    with ss.Server.from_engines(list(engines), list(profiles), max_queue=10_000_000, slo_ms=SLO_MS, **options) as server:
        yield server
        server.close(drain=False)


def throughput(devices: list[RayDevice] | int, seconds: float) -> dict[str, float]:
    """Queries per second with a full queue, and the CPU time of this process per batch, in ms."""
    workers = devices if isinstance(devices, int) else len(devices)
    x = np.zeros(SHAPE, np.uint8)
    with serving(devices, policy="fixed:0") as server:
        server.submit_many([x] * int(1.2 * rate_qps(workers, 1.0) * (seconds + WARM_UP_S)))
        time.sleep(WARM_UP_S)
        start, start_ns, start_s = server.snapshot(), time.process_time_ns(), time.monotonic()
        time.sleep(seconds)
        cpu_ns, took_s, end = time.process_time_ns() - start_ns, time.monotonic() - start_s, server.snapshot()
    answered, batches = (
        {name: sum(row[name] for row in snapshot["subnets"].values()) for name in ("met", "late", "batches")}
        for snapshot in (start, end)
    )
    queries = sum(batches[name] - answered[name] for name in ("met", "late"))
    return {"qps": queries / took_s, "cpu_ms_per_batch": 1e-6 * cpu_ns / (batches["batches"] - answered["batches"])}


def load(devices: list[RayDevice] | int, seconds: float, seed: int) -> dict[str, float]:
    """Attainment and accuracy at half of the highest rate."""
    trace = traces.gamma(rate_qps=rate_qps(4, 0.5), cv2=2.0, duration_s=seconds, slo_ms=SLO_MS, seed=seed)
    with serving(devices) as server:
        found = loadgen.summarize(loadgen.replay(server, trace, [np.zeros(SHAPE, np.uint8)] * len(trace)))
    return {"attainment": found.attainment, "accuracy": found.accuracy, "p99_ms": found.p99_ms}


class Watch:
    """Notes, while open, when the number of live workers changes. `changes` has pairs (time, workers)."""

    def __init__(self, server: ss.Server):
        self.changes: list[tuple[float, int]] = []
        self._server, self._over = server, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(5e-3):
            alive = self._server.health()["alive"]
            if not self.changes or self.changes[-1][1] != alive:
                self.changes.append((time.monotonic(), alive))


def fault(
    devices: list[RayDevice], do_harm: Callable[[ss.Server], object], seconds: float, seed: int
) -> tuple[dict[str, float], loadgen.Replay]:
    """What happens to the queries around a fault. Waits until all workers are back, at most `HOST_S`."""
    trace = traces.gamma(rate_qps=rate_qps(4, 0.4), cv2=2.0, duration_s=seconds, slo_ms=SLO_MS, seed=seed)
    harmed: list[float] = []

    def harm(server: ss.Server, start_s: float) -> None:
        time.sleep(max(0.0, start_s + FAULT_AT * seconds - time.monotonic()))
        harmed.append(time.monotonic())
        do_harm(server)

    with serving(devices) as server, Watch(server) as watch:
        thread = threading.Thread(target=harm, args=(server, time.monotonic()))
        thread.start()
        run = loadgen.replay(server, trace, [np.zeros(SHAPE, np.uint8)] * len(trace))
        thread.join()
        [at_s], end_s = harmed, time.monotonic() + HOST_S
        while server.health()["alive"] < len(devices) and time.monotonic() < end_s:
            time.sleep(0.05)
        while (state := server.snapshot())["waiting"] + state["running"] and time.monotonic() < end_s:
            time.sleep(0.05)  # for answers that are late
        time.sleep(0.1)  # for the watch
        counts = state["queries"]
    lost_s = next((s for s, alive in watch.changes if s > at_s and alive < len(devices)), float("nan"))
    back_s = next((s for s, alive in watch.changes if s > lost_s and alive >= len(devices)), float("nan"))
    after_s = run.arrival_s - (at_s - run.start_s)
    return {
        "noticed_s": lost_s - at_s,
        "back_s": back_s - at_s,
        "failed": counts["failed"] + counts["expired"] + counts["refused"],
        "unanswered": state["waiting"] + state["running"],
        "missed": int((~run.met).sum()),
        "met_from_0.5_s": float(run.met[after_s >= 0.5].mean()),
        "queries": len(trace),
    }, run


def kill(server: ss.Server) -> None:
    """SIGKILL for one process."""
    os.kill(server.pool.members.workers[0].engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]


def stop(server: ss.Server) -> None:
    """SIGSTOP for one process, for 2 s. A silent host looks the same."""
    pid = server.pool.members.workers[0].engine.pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(2.0, os.kill, (pid, signal.SIGCONT)).start()


@contextlib.contextmanager
def one_host(count: int) -> Iterator[list[RayDevice]]:
    """Processes of a cluster on this machine."""
    import ray

    ray.init(address="local", include_dashboard=False, object_store_memory=200 << 20, **QUIET)
    try:
        devices = ss.ray_devices(count, num_cpus=0)
        makers.make_all(devices, Sleeping())  # type: ignore[arg-type]
        yield devices
    finally:
        ray.shutdown()


def host(seconds: float, seed: int) -> dict[str, float]:
    """A host with two of four processes goes away, and another host has room for them."""
    import ray
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=100 << 20) for _ in range(2)]
    ray.init(address=cluster.address, **QUIET)
    try:
        devices = ss.ray_devices(4, num_cpus=1)
        makers.make_all(devices, Sleeping())  # type: ignore[arg-type]
        nodes.append(cluster.add_node(num_cpus=2, object_store_memory=100 << 20))  # the room
        found, _ = fault(devices, lambda _: cluster.remove_node(nodes[0], allow_graceful=False), seconds, seed)
        return found
    finally:
        ray.shutdown()
        cluster.shutdown()


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure. Of queries that failed or were lost, the largest number."""
    return {name: (max if name in WORST else statistics.median)(row[name] for row in rows) for name in rows[0]}


def ratio(remote: list[dict[str, float]], local: list[dict[str, float]], name: str) -> float:
    """The median ratio of neighbouring runs."""
    return statistics.median(a[name] / b[name] for a, b in zip(remote, local, strict=True))


def show(title: str, figures: dict[str, float]) -> None:
    """Prints one line."""
    print(f"{title:34}  " + "  ".join(f"{name} {value:.5g}" for name, value in figures.items()), flush=True)


def alternate(
    options: Options, measure: Callable[[list[RayDevice] | int], dict[str, float]], devices: list[RayDevice]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Runs of local engines and of processes, in alternation."""
    local, remote = [], []
    for _ in range(options.repeats):
        local.append(measure(len(devices)))
        remote.append(measure(devices))
    return local, remote


def measure_throughput(options: Options, devices: list[RayDevice]) -> dict[str, Any]:
    """The part throughput."""
    found = {}
    for count in options.actors:
        local, remote = alternate(options, lambda on: throughput(on, options.seconds), devices[:count])
        found[f"throughput {count}"] = {"local": local, "remote": remote}
        show(f"throughput, {count} local", medians(local))
        show(f"throughput, {count} processes", medians(remote) | {"ratio": ratio(remote, local, "qps")})
    return found


def measure_load(options: Options, devices: list[RayDevice]) -> dict[str, Any]:
    """The part load."""
    local, remote = alternate(options, lambda on: load(on, options.seconds, options.seed), devices[:4])
    show("half load, 4 local", medians(local))
    show("half load, 4 processes", medians(remote))
    return {"load": {"local": local, "remote": remote}}


def measure_faults(options: Options, devices: list[RayDevice]) -> dict[str, Any]:
    """The part faults."""
    found = {}
    for name, do_harm in (("SIGKILL", kill), ("SIGSTOP for 2 s", stop)):
        runs = [fault(devices[:4], do_harm, options.seconds, options.seed) for _ in range(options.repeats)]
        found[name] = [figures for figures, _ in runs]
        show(name, medians(found[name]))
        if options.plot and do_harm is kill:
            shown = {"slackfit": loadgen.series(runs[0][1], window_s=0.1)}
            title, note = "One of 4 processes is killed", f"latencies: {paper_profile().device}"
            plots.replay(shown, options.plot, marks_s=[FAULT_AT * options.seconds], title=title, note=note)
    return found


PARTS = {"throughput": measure_throughput, "load": measure_load, "faults": measure_faults}


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    logging.getLogger("superserve_jax.serving").setLevel(logging.ERROR)  # lost workers are expected
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    results: dict[str, Any] = {}
    if parts := [part for part in options.parts if part in PARTS]:
        with one_host(max(*options.actors, 4)) as devices:
            for part in parts:
                results |= PARTS[part](options, devices)
    if "host" in options.parts:
        results["host"] = [host(options.seconds, options.seed) for _ in range(options.repeats)]
        show("a host with 2 of 4 is gone", medians(results["host"]))
    cli.write_results(options.json, results)


if __name__ == "__main__":
    cli.run(main)
