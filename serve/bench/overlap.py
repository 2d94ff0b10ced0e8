"""Measures what it gains that a worker stages its next batch, and answers the last, while the device computes.

    python serve/bench/overlap.py                       a device that sleeps, for some times that a batch may take
    python serve/bench/overlap.py runs/demo/export      this machine's device with an export, largest subnet

Both ways in turn, each with a new server: first with more queries waiting than the device can serve, which gives its
throughput; then, on the device that sleeps, with bursty traffic on the paper's profile, made faster as the device is, which
shows what SlackFit loses by deciding before the device is free. Everything but the sleep is real: queue, policy, threads,
futures, and the copies of the inputs into staging buffers, for which the CPU's time is measured apart.
Library: serving.server.Server, engines.base.FakeDevice, engines.prepare, loadtest.loadgen, simulation.paper_profile.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tyro

from superserve_jax import cli, errors, files
from superserve_jax.engines import profiling
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.loadtest import loadgen
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.server import Server
from superserve_jax.simulation import metrics, paper_profile, traces

BATCH, SLO_MS = 16, 36.0  # of the paper's profile
LOAD, CV2 = 0.35, 2.0  # of the bursty traffic: the mean over what the fastest subnet carries
QUEUE: dict[str, Any] = {"max_queue": 1_000_000, "max_queue_bytes": 1 << 50}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: an export's directory; if left out, a device that sleeps.
      batch_ms: with one that sleeps, how long its fastest subnet takes for a batch of 16.
      input_shape: with one that sleeps, of an input of dtype uint8.
      queries: how many the throughput is measured with.
      seconds: of bursty traffic.
      rounds: how often each way is measured; medians are printed.
      json: write the figures to this file.
    """

    export: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    batch_ms: tuple[float, ...] = (1.0, 3.0, 10.0)
    input_shape: tuple[int, ...] = (224, 224, 3)
    queries: int = 3000
    seconds: float = 5.0
    rounds: int = 3
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "queries", "seconds", "rounds")
        if not self.batch_ms or min(self.batch_ms) <= 0:
            raise errors.ConfigError(f"batch_ms must be positive milliseconds, got {list(self.batch_ms)}")


def both_ways(measure: Callable[[bool], dict[str, float]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of what `measure(overlap)` gives, both ways in turn."""
    runs = [(measure(False), measure(True)) for _ in range(rounds)]
    off, on = ({key: statistics.median(run[key] for run in of) for key in of[0]} for of in zip(*runs, strict=True))
    return {"off": off, "on": on}


def throughput(target: Server, example: np.ndarray, queries: int) -> float:
    """Queries per second of a new server with all of them waiting."""
    with target:
        target.submit_many([example] * 64)[-1].result()  # warm
        start_s = time.perf_counter()
        for future in target.submit_many([example] * queries):
            future.result()
        return queries / (time.perf_counter() - start_s)


def sleeping(options: Options, batch_ms: float) -> dict[str, Any]:
    """A device that sleeps, so fast that the fastest subnet of the paper's profile takes `batch_ms` for a full batch."""
    paper = paper_profile.paper_profile()
    faster = batch_ms / paper.rows[0].latency_ms[-1]
    table, slo_ms = paper.scaled(faster), SLO_MS * faster
    fastest = Profile(table.batch_sizes, table.rows[:1])
    limit_qps = table.throughput_qps(table.rows[0].subnet)
    trace = traces.gamma(rate_qps=LOAD * limit_qps, cv2=CV2, duration_s=options.seconds, slo_ms=slo_ms, seed=0)
    example = np.random.default_rng(0).integers(0, 256, options.input_shape, dtype=np.uint8)

    def open_server(rows: Profile, overlap: bool) -> Server:
        device = FakeDevice(rows, input_shape=options.input_shape, input_dtype=np.uint8)
        return Server.from_engines([device], rows, slo_ms=slo_ms, overlap=overlap, **QUEUE)

    def measure(overlap: bool) -> dict[str, float]:
        qps = throughput(open_server(fastest, overlap), example, options.queries)
        with open_server(table, overlap) as target:
            done = loadgen.replay(target, trace, [example] * len(trace))
        seen = metrics.summary(done.arrival_s, done.deadline_s, done.finish_s, done.accuracy)
        return {
            "qps": qps,
            "busy": qps / limit_qps,
            "attainment": seen.attainment,
            "accuracy": seen.accuracy,
            "p99_ms": seen.p99_ms,
        }

    return {"batch_ms": batch_ms, "slo_ms": slo_ms, **both_ways(measure, options.rounds)}


def exported(options: Options) -> dict[str, Any]:
    """This machine's first device with the largest subnet of an export."""
    import jax

    from superserve_jax.engines import prepare
    from superserve_jax.engines.device import DeviceEngine

    model = prepare.load(options.export)
    device = jax.devices()[0]
    subnet = max(model.served, key=lambda s: s.accuracy)
    made = DeviceEngine(
        model,
        device,
        subnet_list=[subnet.subnet],
        batch_sizes=(BATCH,),
        lengths=prepare.check_lengths(model.config, None)[-1:],
    )
    example = np.full(made.input_shape, made.pad_id + 1, made.input_dtype)
    [batch_ms] = profiling.measure(made, {subnet.subnet: subnet.accuracy}, (BATCH,), device="this").rows[0].latency_ms
    rows = (Row(subnet.subnet, subnet.accuracy, (batch_ms,)),)
    table = Profile((BATCH,), rows, rows_at=dict.fromkeys(made.lengths, rows))

    def measure(overlap: bool) -> dict[str, float]:
        target = Server.from_engines([made], table, slo_ms=1e6, overlap=overlap, **QUEUE)
        return {"qps": throughput(target, example, options.queries)}

    return {"batch_ms": batch_ms, "device": prepare.device_kind(device), **both_ways(measure, options.rounds)}


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    if options.export is not None:
        found = [exported(options)]
        print(f"largest subnet of {options.export} on {found[0]['device']}, batches of {BATCH}")
        shown = {}
    else:
        found = [sleeping(options, batch_ms) for batch_ms in options.batch_ms]
        print(f"a device that sleeps, batches of {BATCH} inputs of shape {options.input_shape}, dtype uint8")
        shown = {"device busy": "busy", "bursty: attainment": "attainment", "accuracy": "accuracy"}
    table = [("ms a batch", "overlap", "queries/s", "gain", *shown, *(["p99 ms"] if shown else []))]
    for each in found:
        for way in "off", "on":
            figures = each[way]
            cells = (f"{each['batch_ms']:.1f}", way, f"{figures['qps']:,.0f}", f"{figures['qps'] / each['off']['qps']:.3f}")
            more = [f"{100 * figures[key]:.2f} %" for key in shown.values()]
            table.append((*cells, *more, *([f"{figures['p99_ms']:.1f}"] if shown else [])))
    cli.print_table(table)
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    cli.run(main)
