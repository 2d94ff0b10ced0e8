"""Searches a trained run for Pareto-optimal subnets and chooses those to serve.

    python train/search.py runs/digits_resnet --candidates 200

Leaves search.json and search.png in the run's folder; calibrate, evaluate and export come next.
Library: training.stages.search (training.search, training.calibration, training.evaluation).
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from superserve_jax import cli, files
from superserve_jax.training import runs, stages


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      run: the run's folder.
      candidates: subnets to try; as the run's config says if left out.
      served: subnets to choose at most; as the run's config says if left out.
      json: write the chosen subnets to this file.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    candidates: int | None = None
    served: int | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    run = runs.Run.open(options.run)
    changes = {k: v for k in ("candidates", "served") if (v := getattr(options, k)) is not None}
    settings = dataclasses.replace(run.config.search, **changes)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, search=settings))
    chosen = stages.search(run)
    cli.print_table(
        [
            ("MFLOPs", "validation accuracy"),
            *((f"{c.flops / 1e6:.2f}", f"{100 * c.accuracy:.2f} %") for c in chosen),
        ]
    )
    if options.json:
        files.write_json(options.json, [c.to_json() for c in chosen])
    print(f"plot: {run.workdir / 'search.png'}; go on with `python train/calibrate.py {run.workdir}`")


if __name__ == "__main__":
    cli.run(main)
