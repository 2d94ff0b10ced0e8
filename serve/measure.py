"""Measures the latency profile of an export on this machine's device, and keeps it beside the export.

    python serve/measure.py runs/digits_resnet/export --plot latency.png

Of a SuperNet that reads text there is one table for each length bucket that batches are padded to (--lengths 32 64 128).

The profile holds the subnets worth serving here: no other is both faster and more accurate, and neighbours differ by at least
0.3 points of accuracy and 10 % of latency. The server and replay.py find it by themselves.
Whether latencies are as SlackFit needs them (the paper's P1 to P3) is checked on all that was measured, before any subnet is
left out and noise is repaired.
Library: serving.executables.DeviceEngine, serving.measuring.measure and properties, checkpoint.profile_path, plots.latencies.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated

import jax
import tyro

import superserve_jax as ss
from superserve_jax import checkpoint, cli, files, plots
from superserve_jax import profile as profiles
from superserve_jax.serving import executables, measuring

STATEMENTS = {
    "P1": "a larger batch takes longer",
    "P2": "a more accurate subnet takes longer",
    "P3": "the fastest subnet does a larger batch in the time of the most accurate",
}
UNITS = {"P1": "long", "P2": "long", "P3": "large"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      batch_sizes: batch sizes to make executables for.
      lengths: length buckets to make executables for; if left out, powers of two from 16 up to the model's longest.
      repeats: calls of each subnet at each batch size and length.
      json: write the profile to this file, too.
      plot: draw the latencies over subnet and batch into this file (PNG).
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] | None = None
    repeats: int = 50
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    profiles.check_batch_sizes(options.batch_sizes)  # before minutes of compiling
    model = ss.load(options.export)
    device = jax.devices()[0]
    kind = executables.device_kind(device)
    lengths = executables.check_lengths(model.config, options.lengths)
    engine = executables.DeviceEngine(
        model, device, subnet_list=model.subnets, batch_sizes=options.batch_sizes, lengths=lengths
    )
    accuracies = {s.subnet: s.accuracy for s in model.served}
    measured = measuring.measure(engine, accuracies, options.batch_sizes, device=kind, repeats=options.repeats)
    profile = executables.worth_serving(measured).monotone()
    path = checkpoint.profile_path(options.export, kind)
    profile.save(path)
    print(f"median latency in ms on {kind}, {len(profile.rows)} of {len(model.subnets)} subnets worth serving:")
    for at_length, as_measured in zip(profile.tables, measured.tables, strict=True):
        report(at_length, as_measured, {s.subnet: s.flops for s in model.served})
    if options.json:
        files.write_json(options.json, profile.to_json())
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        values = [[ms for t in profile.tables for ms in t.row(r.subnet).latency_ms] for r in profile.rows]
        shapes = [f"{b} x {t.lengths[0]}" if t.lengths else str(b) for t in profile.tables for b in profile.batch_sizes]
        plots.latencies(values, shapes, [r.accuracy for r in profile.rows], options.plot, title=profile.device)
        print(f"plot: {options.plot}")
    print(f"kept in {path}")


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
    slowest, fastest = profile.rows[-1].latency_ms[-1], profile.rows[0].latency_ms[-1]
    print(f"at batch {profile.max_batch} the most accurate subnet takes {slowest / fastest:.1f} times as long as the fastest")
    for p in measuring.properties(measured):
        print(f"{p.name}: {STATEMENTS[p.name]}: {p.holding} of {p.of} times; at worst {p.worst:.2f} times as {UNITS[p.name]}")


if __name__ == "__main__":
    cli.run(main)
