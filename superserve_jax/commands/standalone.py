"""Trains subnets of a run as standalone networks, and prints how much accuracy sharing weights costs.

    superserve standalone runs/digits_resnet
    superserve standalone runs/digits_resnet --subnets smallest 3 largest

A standalone subnet has the run's initial weights, data order, optimiser, schedule, number of steps, calibration and test data.
It learns from labels only. Ctrl-C keeps the work in RUN/alone; the same command goes on from there.
Library: training.stages.standalone (training.loop).
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from superserve_jax import cli, errors
from superserve_jax.exports import Served
from superserve_jax.training import stages
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      run: the folder of an evaluated run.
      subnets: "smallest", "largest", or positions in evaluation.json, where 0 has the fewest FLOPs.
      json: write the table to this file.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    subnets: tuple[str, ...] = ("smallest", "largest")
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    run = Run.open(options.run)
    evaluated = run.evaluated()
    chosen = {name: find(evaluated, name) for name in options.subnets}  # refuses a wrong name before any training
    results = []
    for name, shared in chosen.items():
        trained = stages.standalone(run, shared.subnet, name)
        results.append({"name": name, **shared.to_json(), "accuracy_alone": trained.accuracy})
    columns = {
        "subnet": lambda r: r["name"],
        "MFLOPs": lambda r: f"{r['flops'] / 1e6:.2f}",
        "shared": lambda r: f"{100 * r['accuracy']:.2f} %",
        "standalone": lambda r: f"{100 * r['accuracy_alone']:.2f} %",
        "price of sharing": lambda r: f"{100 * (r['accuracy_alone'] - r['accuracy']):+.2f} points",
    }
    cli.print_columns(columns, results)
    cli.write_results(options.json, results)


def find(evaluated: list[Served], name: str) -> Served:
    """The subnet that an option names. Raises ConfigError if there is none."""
    ends = {"smallest": 0, "largest": len(evaluated) - 1}
    place = ends[name] if name in ends else int(name) if name.isdecimal() else -1
    if not 0 <= place < len(evaluated):
        raise errors.ConfigError(f"subnets must be smallest, largest or a number from 0 to {len(evaluated) - 1}, got '{name}'")
    return evaluated[place]
