"""Measures the latency profile of an export on this machine's device, and keeps it beside the export.

    python serve/measure.py runs/digits_resnet/export --plot latency.png

Of a SuperNet that reads text there is one table for each length bucket that batches are padded to (--lengths 32 64 128).

The profile holds the subnets worth serving here: no other is both faster and more accurate, and neighbours differ by at least
0.3 points of accuracy and 10 % of latency (--keep-all keeps these). The server and replay.py find it by themselves.
The faster way of slicing weights is found first (--slicing decides it). More than --executables subnets share so many of them
per batch size, in subnet buckets; what that costs is measured beside executables of their own for some.
Latencies are measured beside a server and a load generator, as batches run in earnest; --no-load leaves those out. Devices of
several kinds are measured one after the other, and have a profile each.
Whether latencies are as SlackFit needs them (the paper's P1 to P3) is checked on all that was measured, before any subnet is
left out and noise is repaired.
Library: engines.prepare, engines.device, engines.subnet_buckets, engines.profiling.measure and properties,
checkpoint.profile_path, plots.latencies.
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
from superserve_jax import cli, exports, files, plots
from superserve_jax.engines import prepare, profiling, subnet_buckets
from superserve_jax.engines.device import DeviceEngine, Slicing
from superserve_jax.engines.subnet_buckets import Flops
from superserve_jax.exports import Model
from superserve_jax.profile import check_batch_sizes
from superserve_jax.serving import server

STATEMENTS = {
    "P1": "a larger batch takes longer",
    "P2": "a more accurate subnet takes longer",
    "P3": "the fastest subnet does a larger batch in the time of the most accurate",
}
EXACT = 24  # subnets that are measured with executables of their own, too, to see what sharing costs
UNITS = {"P1": "long", "P2": "long", "P3": "large"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      batch_sizes: batch sizes to make executables for.
      lengths: length buckets to make executables for; if left out, powers of two from 16 up to the model's longest.
      slicing: how weights are sliced; if left out, the faster way.
      executables: the most subnet buckets, and so executables of each shape.
      keep_all: keep every subnet that no other beats, however near its neighbours are.
      repeats: calls of each subnet at each batch size and length.
      load: measure beside the threads of a server under load.
      json: write the profile to this file, too; of several kinds of devices, that of the first.
      plot: draw the latencies over subnet and batch into this file (PNG), of the first, too.
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] | None = None
    slicing: Slicing | None = None
    executables: int = prepare.MAX_SUBNET_BUCKETS
    keep_all: bool = False
    repeats: int = 50
    load: bool = True
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    check_batch_sizes(options.batch_sizes)  # before minutes of compiling
    for name, value in (("--repeats", options.repeats), ("--executables", options.executables)):
        if value < 1:
            raise ss.ConfigError(f"{name} must be at least 1, got {value}")
    model = ss.load(options.export)
    lengths = prepare.check_lengths(model.config, options.lengths)
    kinds = {prepare.device_kind(device): device for device in jax.devices()[::-1]}  # the first of a kind, written last
    for kind, device in kinds.items():
        measure(options, model, device, kind, lengths)


def measure(options: Options, model: Model, device: Any, kind: str, lengths: Sequence[int]) -> None:
    """Measures one kind of device, and keeps the profile."""
    slicing = options.slicing or choose_slicing(model, device, options, lengths)
    envelopes = subnet_buckets.choose(model.subnets, model.config.flops, options.executables)

    def make_engine(subnet_list: Sequence[ss.Subnet], envelopes: Mapping[ss.Subnet, ss.Subnet]) -> DeviceEngine:
        shapes = {"batch_sizes": options.batch_sizes, "lengths": lengths}
        return DeviceEngine(model, device, subnet_list=subnet_list, envelopes=envelopes, slicing=slicing, **shapes)

    engine = make_engine(model.subnets, envelopes)
    accuracies = {s.subnet: s.accuracy for s in model.served}
    calls = {"repeats": options.repeats, "background": server.background_traffic if options.load else None}
    measured = profiling.measure(engine, accuracies, options.batch_sizes, device=kind, **calls)
    measured = dataclasses.replace(measured.with_envelopes(envelopes), slicing=slicing)
    if measured.envelopes:
        exact = make_engine([r.subnet for r in measured.rows[:: -(-len(measured.rows) // EXACT)]], {})
        report_sharing(measured, engine, exact, model.config.flops, options.repeats)
    profile = (measured.pareto() if options.keep_all else prepare.worth_serving(measured)).monotone()
    path = exports.profile_path(options.export, kind)
    profile.save(path)
    print(f"median latency in ms on {kind}, {len(profile.rows)} of {len(model.subnets)} subnets worth serving:")
    for at_length, as_measured in zip(profile.each_length, measured.each_length, strict=True):
        report(at_length, as_measured, {s.subnet: s.flops for s in model.served})
    if options.json:
        files.write_json(options.json, profile.to_json())
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        values = [[ms for t in profile.each_length for ms in t.row(r.subnet).latency_ms] for r in profile.rows]
        shapes = [f"{b} x {t.lengths[0]}" if t.lengths else str(b) for t in profile.each_length for b in profile.batch_sizes]
        plots.latencies(values, shapes, [r.accuracy for r in profile.rows], options.plot, title=profile.device)
        print(f"plot: {options.plot}")
    print(f"kept in {path}")


def choose_slicing(model: Model, device: Any, options: Options, lengths: Sequence[int]) -> Slicing:
    """The better way, and prints why."""
    slicing, ratio = prepare.faster_slicing(model, device, options.batch_sizes, lengths=lengths)
    print(
        f"slicing: '{slicing}'; in the call it takes {ratio:.2f} times as long as with kept slices, every call another subnet"
    )
    return slicing


def report_sharing(
    measured: ss.Profile,
    shared: DeviceEngine,
    exact: DeviceEngine,
    flops: Flops,
    repeats: int,
) -> None:
    """Prints what sharing executables costs: FLOPs of all subnets, latencies of those that `exact` has executables for."""
    bucket_of = {r.subnet: r.envelope or r.subnet for r in measured.rows}
    extra = subnet_buckets.extra(bucket_of, flops)
    buckets = len(set(bucket_of.values()))
    print(f"{len(bucket_of)} subnets in {buckets} subnet buckets: {100 * extra:.1f} % more FLOPs than needed")
    ratios = []
    accuracies = {s: measured.row(s).accuracy for s in exact.subnets}
    for engine in (shared, exact):
        again = profiling.measure(engine, accuracies, measured.batch_sizes, device=measured.device, repeats=repeats)
        ratios.append(np.array([again.row(s).latency_ms for s in accuracies]))
    ratio = ratios[0] / ratios[1]
    print(
        f"latency over that of an executable of its own, {len(accuracies)} subnets: "
        + ", ".join(f"{np.mean(column):.2f} at batch {b}" for b, column in zip(measured.batch_sizes, ratio.T, strict=True))
        + f"; at worst {ratio.max():.2f}"
    )


def report(profile: ss.Profile, measured: ss.Profile, cost: Mapping[ss.Subnet, int]) -> None:
    """Prints what was measured at one length.

    Args:
      profile: of the subnets worth serving, repaired. measured: of all subnets, as it was before that.
      cost: FLOPs of each subnet.
    """
    if profile.lengths:
        print(f"\n{profile.lengths[0]} tokens")
    cli.print_table(
        [
            ("MFLOPs", "accuracy", *(f"batch {b}" for b in profile.batch_sizes), "queries/s"),
            *(
                (
                    f"{cost[r.subnet] / 1e6:.2f}",
                    f"{100 * r.accuracy:.2f} %",
                    *(f"{ms:.2f}" for ms in r.latency_ms),
                    f"{profile.throughput_qps(r.subnet):,.0f}",
                )
                for r in profile.rows
            ),
        ]
    )
    spread = statistics.median(p99 / ms for r in profile.rows for ms, p99 in zip(r.latency_ms, r.p99_ms, strict=True))
    print(f"the 99th percentile is {spread:.2f} times the median (the middle one of all these latencies)")
    slowest, fastest = profile.rows[-1].latency_ms[-1], profile.rows[0].latency_ms[-1]
    print(f"at batch {profile.max_batch} the most accurate subnet takes {slowest / fastest:.1f} times as long as the fastest")
    for p in profiling.properties(measured):
        print(f"{p.name}: {STATEMENTS[p.name]}: {p.holding} of {p.of} times; at worst {p.worst:.2f} times as {UNITS[p.name]}")


if __name__ == "__main__":
    cli.run(main)
