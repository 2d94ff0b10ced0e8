"""Measures the latency profile of an export on this machine, and saves it in the export's directory.

    superserve measure runs/digits_resnet/export --plot latency.png

The server and `superserve replay` find the profile there. For a model of sequences, the profile has latencies for each length
bucket (such as `--lengths 32 64 128`). Devices of several kinds are measured one after the other and get a profile each. The
steps:

1. Find the faster way of slicing weights (--slicing decides it). On a CPU, also find out whether batches are faster in parts,
   and whether several workers with fewer cores each are faster than one (--cpu-workers decides it).
2. Choose subnet buckets, if there are more subnets than --executables. Also measure some subnets with executables of their
   own, and print how much slower the shared executables are.
3. Measure latencies beside a server and a load generator, as when serving (--no-load leaves them out).
4. Check SlackFit's assumptions (the paper's P1 to P3) on all subnets, before noise is repaired.
5. Keep the subnets worth serving: no other subnet is both faster and more accurate. Neighbours differ by at least 0.1 points
   of accuracy and 5 % of latency (--keep-all skips this limit).

It prints latency and throughput of the subnets worth serving, the results of the checks, and the profile's path.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import superserve_jax as ss
from superserve_jax import cli, exports, machine, plots
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.engines import (
    cpu_clients,
    cpu_workers,
    default_batch_sizes,
    measuring,
    prepare,
    profiling,
    subnet_buckets,
)
from superserve_jax.engines.device import DeviceEngine, Slicing
from superserve_jax.engines.keys import Device
from superserve_jax.engines.subnet_buckets import Flops
from superserve_jax.exports import Model, Served
from superserve_jax.profile import check_batch_sizes
from superserve_jax.serving import server

STATEMENTS = {
    "P1": "a larger batch takes longer",
    "P2": "a more accurate subnet takes longer",
    "P3": "in the time of the most accurate subnet, the fastest subnet computes a larger batch",
}
EXACT = 24  # subnets that are also measured with executables of their own, to compare with shared ones
BUSY = 3.0  # (p99 latency) / (median latency) on a machine that is too busy to measure; about 1.3 on a quiet one
UNITS = {"P1": "latencies", "P2": "latencies", "P3": "batch sizes"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      batch_sizes: the batch sizes to make executables for; if left out, 1 to 16, and on GPUs up to 64 if throughput rises.
      lengths: the length buckets to make executables for; if left out, powers of two from 16 up to the model's longest.
      slicing: how weights are sliced; if left out, the faster way.
      compute_dtype: the dtype to compute in; bfloat16 is for GPUs, and the export needs accuracies in it.
      cpu_workers: how many workers divide the cores of a CPU; if left out, the better number.
      executables: the largest number of subnet buckets, which is also the number of executables of each shape.
      keep_all: keep every subnet that no other subnet beats, even if its neighbours are nearly equal.
      repeats: the number of calls of each subnet at each batch size and length bucket.
      load: measure beside a server under load.
      json: also write the profile to this file. With several kinds of devices, it is the profile of the first kind.
      plot: draw the latencies by subnet and batch size into this file (PNG), also for the first kind.
      plot_flops: draw the FLOPs by subnet and batch size into this file (PNG).
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    batch_sizes: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    slicing: Slicing | None = None
    compute_dtype: ComputeDtype = "float32"
    cpu_workers: int | None = None
    executables: int = prepare.MAX_SUBNET_BUCKETS
    keep_all: bool = False
    repeats: int = 50
    load: bool = True
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None
    plot_flops: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "executables", "repeats")


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    if options.batch_sizes is not None:
        check_batch_sizes(options.batch_sizes)  # before minutes of compiling
    cpu_clients.check_workers(options.cpu_workers)
    if options.cpu_workers is not None and (len(jax.devices()) > 1 or jax.devices()[0].platform != "cpu"):
        raise ss.ConfigError(f"--cpu-workers is for a single CPU device, got {jax.devices()}; leave it out")
    model = ss.load(options.export)
    model.accuracies(options.compute_dtype)
    lengths = prepare.check_lengths(model.config, options.lengths)
    kinds = {
        machine.device_kind(device): device for device in jax.devices()[::-1]
    }  # reversed, so that the first device of a kind remains
    for kind, device in kinds.items():
        measure(options, model, device, kind, lengths)


def measure(options: Options, model: Model, device: Device, kind: str, lengths: Sequence[int]) -> None:
    """Measures one kind of device, saves the profile and prints it."""
    batch_sizes = options.batch_sizes or default_batch_sizes.candidates([device])
    way: dict[str, Any] = {"lengths": lengths, "compute_dtype": options.compute_dtype}
    slicing = options.slicing or choose_slicing(model, device, batch_sizes, **way)
    way["slicing"] = slicing
    workers, parts = (1, {}) if device.platform != "cpu" else choose_cores(options, model, batch_sizes, **way)
    envelopes = subnet_buckets.choose(model.subnets, model.config.flops, options.executables)

    def make_engines(subnet_list: Sequence[ss.Subnet], envelopes: Mapping[ss.Subnet, ss.Subnet]) -> list[DeviceEngine]:
        given = {"subnet_list": subnet_list, "envelopes": envelopes, "batch_sizes": batch_sizes, "parts": parts, **way}
        return cpu_workers.create(model, workers, **given) if workers > 1 else [DeviceEngine(model, device, **given)]

    engine, *beside = make_engines(model.subnets, envelopes)
    load = server.background_traffic if options.load else None
    measured = measuring.measure(model, engine, repeats=options.repeats, background=load, beside=beside)
    if measured.envelopes:
        [exact, *_] = make_engines([r.subnet for r in measured.rows[:: -(-len(measured.rows) // EXACT)]], {})
        report_sharing(measured, engine, exact, model.config.flops, options.repeats)
    profile = measured.pareto().monotone() if options.keep_all else measuring.worth_serving(measured)
    path = exports.profile_path(model.path, kind, options.compute_dtype)
    print(f"median latency in ms on {kind}, {len(profile.rows)} of {len(model.subnets)} subnets worth serving:")
    for at_length, as_measured in zip(profile.each_length, measured.each_length, strict=True):
        report(at_length, as_measured, {s.subnet: s for s in model.served})
    cli.write_results(options.json, profile.to_json())
    if options.plot:
        values = [[ms for t in profile.each_length for ms in t.row(r.subnet).latency_ms] for r in profile.rows]
        shapes = [f"{b} x {t.lengths[0]}" if t.lengths else str(b) for t in profile.each_length for b in profile.batch_sizes]
        title = f"Latency on {profile.device} (as the paper's Figure 6)"
        plots.latencies(values, shapes, [r.accuracy for r in profile.rows], options.plot, title=title)
        print(f"plot: {options.plot}")
    if options.plot_flops:
        cost = {s.subnet: s.flops / 1e6 for s in model.served}
        values = [[size * cost[r.subnet] for size in profile.batch_sizes] for r in profile.rows]
        title = "Multiply-adds of a batch (as the paper's Figure 12)" + ", at the longest length" * bool(profile.lengths)
        sizes, accuracies = list(map(str, profile.batch_sizes)), [r.accuracy for r in profile.rows]
        plots.flops(values, sizes, accuracies, options.plot_flops, title=title, unit="MFLOPs")
        print(f"plot: {options.plot_flops}")
    replaced = " (replaces the one measured before)" if path.exists() else ""
    profile.save(path)  # last, so that a read-only export loses nothing of what was measured
    dtype = options.compute_dtype
    option, argument = ([], "") if dtype == "float32" else (["--compute-dtype", dtype], f", compute_dtype={dtype!r}")
    following = "replay" if model.manifest["training"].get("data") else "serve"  # a replay needs labelled inputs
    print(
        f"profile: {path}{replaced}; go on with `{cli.command(following, model.path, *option)}`, or serve it from Python: "
        f"superserve_jax.Server({str(model.path)!r}{argument})"
    )


def choose_slicing(model: Model, device: Device, batch_sizes: Sequence[int], **way: Any) -> Slicing:
    """Returns the faster way of slicing, and prints how much faster it is. The arguments are those of `faster_slicing`."""
    slicing, ratio = measuring.faster_slicing(model, device, batch_sizes, **way)
    print(f"weights are sliced '{slicing}', the faster way here: time of 'in_call' / time of 'kept' is {ratio:.2f}")
    return slicing


def choose_cores(options: Options, model: Model, batch_sizes: Sequence[int], **way: Any) -> tuple[int, dict[int, int]]:
    """Returns the better number of workers on a CPU and the parts of their batches, and prints how much faster they are.

    `way` are arguments of `DeviceEngine`.
    """
    if not cpu_clients.are_supported():
        print("cores: every batch runs with all cores, because this version of jaxlib makes no CPU devices with one thread")
        return 1, {}
    way |= {"subnet_list": model.subnets}
    parts, ratio = cpu_workers.faster_parts(model, batch_sizes, **way)
    shown = ", ".join(f"batch {size} in parts of {part}" for size, part in parts.items()) or "no batch in parts"
    print(f"cores: {shown}; time of whole batches / time in parts is {ratio:.2f} at batch {batch_sizes[-1]}")
    workers = options.cpu_workers if len(jax.devices()) == 1 else 1
    if workers is None:
        workers, ratio = cpu_workers.faster_workers(model, batch_sizes, parts, **way)
        print(f"{workers} worker(s): throughput of a worker on each core / throughput of one worker is {ratio:.2f}")
    return workers, cpu_clients.parts_of_workers(parts, workers)


def report_sharing(measured: ss.Profile, shared: DeviceEngine, exact: DeviceEngine, flops: Flops, repeats: int) -> None:
    """Prints the cost of sharing executables: in FLOPs for all subnets, and in latency for the subnets of `exact`."""
    bucket_of = {r.subnet: r.envelope or r.subnet for r in measured.rows}
    extra = subnet_buckets.extra(bucket_of, flops)
    buckets = len(set(bucket_of.values()))
    print(f"{len(bucket_of)} subnets in {buckets} subnet buckets: {100 * extra:.1f} % more FLOPs than with own executables")
    accuracies = {s: measured.row(s).accuracy for s in exact.subnets}

    def latencies(engine: DeviceEngine) -> np.ndarray:
        again = profiling.measure(engine, accuracies, measured.batch_sizes, device=measured.device, repeats=repeats)
        return np.array([again.row(s).latency_ms for s in accuracies])

    ratio = latencies(shared) / latencies(exact)
    print(
        f"latency with a shared executable / with an own one, mean of {len(accuracies)} subnets: "
        + ", ".join(f"{np.mean(column):.2f} at batch {b}" for b, column in zip(measured.batch_sizes, ratio.T, strict=True))
        + f"; largest {ratio.max():.2f}"
    )


def report(profile: ss.Profile, measured: ss.Profile, served: Mapping[ss.Subnet, Served]) -> None:
    """Prints the latencies at one length, and how far SlackFit's assumptions hold.

    Args:
      profile: the profile of the subnets worth serving.
      measured: the profile of all subnets, before noise was repaired.
      served: what the export says about each subnet.
    """
    if profile.lengths:
        print(f"\n{profile.lengths[0]} tokens")
    lines: list[tuple[str, ...]] = [("MFLOPs", "accuracy", *(f"batch {b}" for b in profile.batch_sizes), "queries/s")]
    for r in profile.rows:
        latencies = (f"{ms:.2f}" for ms in r.latency_ms)
        qps = f"{profile.throughput_qps(r.subnet):,.0f}"
        accuracy = "unknown" if served[r.subnet].accuracy is None else f"{100 * r.accuracy:.2f} %"
        lines.append((f"{served[r.subnet].flops / 1e6:.2f}", accuracy, *latencies, qps))
    cli.print_table(lines)
    spread = statistics.median(p99 / ms for r in profile.rows for ms, p99 in zip(r.latency_ms, r.p99_ms, strict=True))
    print(f"p99 latency / median latency: {spread:.2f} (median over all subnets and batch sizes)")
    if spread > BUSY:
        print(
            f"The p99 latencies are more than {BUSY:g} times the medians, so the machine was busy. Policies plan with them, "
            "and choose smaller subnets than necessary. Measure again when the machine is quiet."
        )
    slowest, fastest = profile.rows[-1].latency_ms[-1], profile.rows[0].latency_ms[-1]
    print(f"at batch {profile.max_batch} the most accurate subnet takes {slowest / fastest:.1f} times as long as the fastest")
    print("SlackFit assumes the following, here of all subnets. Exceptions to P2 are mostly subnets that are left out above:")
    for p in profiling.properties(measured):
        print(f"{p.name}: {STATEMENTS[p.name]}: {p.holding} of {p.of} times; lowest ratio {p.worst:.2f} (of {UNITS[p.name]})")
