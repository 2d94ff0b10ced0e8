"""Measures the latency profile of an export on this machine's device, and keeps it beside the export.

    python serve/measure.py runs/digits_resnet/export

The profile holds the subnets worth serving here: no other is both faster and more accurate, and neighbours differ by at least
0.3 points of accuracy and 10 % of latency. The server and replay.py find it by themselves.
Library: serving.executables.DeviceEngine and measure, checkpoint.profile_path, profile.Profile.
"""

import dataclasses
import pathlib
from typing import Annotated

import jax
import tyro

import superserve_jax as ss
from superserve_jax import checkpoint, cli
from superserve_jax.serving import executables


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      batch_sizes: batch sizes to make executables for.
      repeats: calls of each subnet at each batch size.
      json: write the profile to this file, too.
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 50
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    model = ss.load(options.export)
    device = jax.devices()[0]
    kind = executables.device_kind(device)
    engine = executables.DeviceEngine(model, device, subnet_list=model.subnets, batch_sizes=options.batch_sizes)
    profile = executables.measure(model, engine, options.batch_sizes, kind, repeats=options.repeats)
    path = checkpoint.profile_path(options.export, kind)
    profile.save(path)
    print(f"median latency in ms on {kind}, {len(profile.rows)} of {len(model.subnets)} subnets worth serving:")
    cost = {s.subnet: s.flops for s in model.served}
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
    if options.json:
        cli.write_json(options.json, profile.to_json())
    print(f"kept in {path}")


if __name__ == "__main__":
    cli.run(main)
