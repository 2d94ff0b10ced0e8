"""Measures the gain of overlap: while the device computes, a worker stages its next batch and answers the last one.

    python serve/bench/overlap.py                       a device that sleeps
    python serve/bench/overlap.py runs/demo/export      this machine's device, with the subnet of an export that has most FLOPs

Both ways, with and without overlap, run in turn, each with a new server. The program prints

- the throughput: how many queries per second a server answers that has more queries waiting than it can serve;
- with a device that sleeps, also attainment, accuracy and p99 latency of bursty traffic. The profile is
  `simulation.paper_profile`: from memory, unverified, about twice the paper's throughput. It is scaled to the speed of the
  device. This shows what SlackFit loses by deciding before the device is free.

Everything but the sleep is real: queue, policy, threads, futures, and the copies of inputs into staging buffers. The file of
--json is written after each round, so it has figures if the program is stopped.
"""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from superserve_jax import cli, errors, files, machine
from superserve_jax.engines import prepare, profiling
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.fake import FakeDevice
from superserve_jax.loadtest import loadgen
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.server import Server
from superserve_jax.simulation import paper_profile, traces

BATCH, SLO_MS = 16, 36.0  # as with simulation.paper_profile
LOAD, CV2 = 0.35, 2.0  # of the bursty traffic; the load is its mean rate / the throughput of the fastest subnet
QUEUE: dict[str, Any] = {"max_queue": 1_000_000, "max_queue_bytes": 1 << 50}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: an export's directory; if left out, the device sleeps.
      batch_ms: with a device that sleeps, the times of its fastest subnet for a batch of 16 to try.
      input_shape: with a device that sleeps, the shape of an input of dtype uint8.
      queries: the number of queries to measure the throughput with.
      seconds: the length of the bursty traffic.
      rounds: the number of measurements with and without overlap; the program prints medians.
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


def both_ways(measure: Callable[[bool], dict[str, float]], rounds: int) -> Iterator[dict[str, Any]]:
    """Calls `measure(overlap)` with False and True in turn. Yields the medians of the figures after each round."""
    runs = []
    for _ in range(rounds):
        runs.append((measure(False), measure(True)))
        off, on = ({key: statistics.median(r[key] for r in way) for key in way[0]} for way in zip(*runs, strict=True))
        yield {"off": off, "on": on, "rounds": len(runs)}


def throughput(target: Server, example: np.ndarray, queries: int) -> float:
    """Queries per second of a new server if all queries are submitted at the start."""
    with target:
        target.submit_many([example] * 64)[-1].result()  # warm-up
        start_s = time.perf_counter()
        for future in target.submit_many([example] * queries):
            future.result()
        return queries / (time.perf_counter() - start_s)


def sleeping(options: Options, batch_ms: float) -> Iterator[dict[str, Any]]:
    """Yields the figures of a device that sleeps after each round. The fastest subnet takes `batch_ms` for a full batch."""
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
        seen = loadgen.summarize(done)
        bursty = {"attainment": seen.attainment, "accuracy": seen.accuracy, "p99_ms": seen.p99_ms}
        return {"qps": qps, "busy": qps / limit_qps, **bursty}

    for both in both_ways(measure, options.rounds):
        yield {"batch_ms": batch_ms, "slo_ms": slo_ms, **both}


def exported(options: Options) -> Iterator[dict[str, Any]]:
    """Yields the figures of this machine's first device after each round. It runs the subnet of an export with most FLOPs."""
    model = prepare.load(options.export)
    device = jax.devices()[0]
    subnet = max(model.served, key=lambda s: s.flops)  # accuracies of random weights are all 0
    lengths = prepare.check_lengths(model.config, None)[-1:]
    made = DeviceEngine(model, device, subnet_list=[subnet.subnet], batch_sizes=(BATCH,), lengths=lengths)
    example = np.full(made.input_shape, made.pad_id + 1, made.input_dtype)
    [batch_ms] = profiling.measure(made, {subnet.subnet: subnet.known_accuracy}, (BATCH,), device="this").rows[0].latency_ms
    rows = (Row(subnet.subnet, subnet.known_accuracy, (batch_ms,)),)
    table = Profile((BATCH,), rows, rows_at=dict.fromkeys(made.lengths, rows))

    def measure(overlap: bool) -> dict[str, float]:
        target = Server.from_engines([made], table, slo_ms=1e6, overlap=overlap, **QUEUE)
        return {"qps": throughput(target, example, options.queries)}

    for both in both_ways(measure, options.rounds):
        yield {"batch_ms": batch_ms, "device": machine.device_kind(device), **both}


def measure(options: Options, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """The figures that the program prints. Calls `save` after each round with the figures so far."""
    found: list[dict[str, Any]] = []
    devices = [exported(options)] if options.export is not None else [sleeping(options, ms) for ms in options.batch_ms]
    for i, rounds in enumerate(devices):
        for figures in rounds:
            found[i:] = [figures]
            save(found)
    return found


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    columns = {
        "ms per batch": "{0[batch_ms]:.1f}".format,
        "overlap": "{0[overlap]}".format,
        "queries/s": "{0[qps]:,.0f}".format,
        "gain": "{0[gain]:.3f}".format,
    }
    found = measure(options, functools.partial(files.write_json, options.json) if options.json else lambda _: None)
    if options.export is not None:
        print(f"largest subnet of {options.export} on {found[0]['device']}, batches of {BATCH}")
    else:
        print(f"a device that sleeps, batches of {BATCH} inputs of shape {options.input_shape}, dtype uint8")
        columns |= {
            "device busy": "{0[busy]:.2%}".format,
            "bursty: attainment": "{0[attainment]:.2%}".format,
            "accuracy": "{0[accuracy]:.2%}".format,
            "p99 ms": "{0[p99_ms]:.1f}".format,
        }
    lines = [
        {**each, **each[way], "overlap": way, "gain": each[way]["qps"] / each["off"]["qps"]}
        for each in found
        for way in ("off", "on")
    ]
    cli.print_columns(columns, lines)
    cli.write_results(options.json, found)


if __name__ == "__main__":
    cli.run(main)
