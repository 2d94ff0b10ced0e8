"""Exports an evaluated run: one self-describing directory with weights, statistics and the list of served subnets.

    superserve export runs/digits_resnet --out exports/digits

An older export in the same place is replaced atomically. Go on with `superserve measure`.
Library: training.stages.export (exports.export, exports.load).
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

import superserve_jax as ss
from superserve_jax import cli
from superserve_jax.training import stages
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      run: the run's folder.
      out: the export's directory; export/ in the run's folder if left out.
      json: write a description to this file.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    out: pathlib.Path | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    run = Run.open(options.run)
    path = stages.export(run, options.out)
    model = ss.load(path)  # checks that the export can be read
    size = sum(f["bytes"] for f in model.manifest["files"].values())
    weights, statistics = (sum(a.nbytes for a in arrays.values()) for arrays in (model.params, model.statistics))
    cli.print_table(stages.table(list(model.served)))
    print(stages.precision(run, model.served))
    cli.write_results(
        options.json,
        {
            "path": str(path),
            "bytes": size,
            "weights_bytes": weights,
            "statistics_bytes": statistics,
            "served": [s.to_json() for s in model.served],
        },
    )
    print(
        f"{path}: {len(model.served)} served subnets, {size / 2**20:.1f} MiB; {statistics:,} bytes of statistics, "
        f"{weights:,} of weights; go on with `{cli.command('measure', path)}`"
    )
