"""Measures a run's served subnets on test images, with their own SubnetNorm statistics and with the largest subnet's.

    python train/evaluate.py runs/digits_resnet

The second column is the paper's point: one set of statistics for all subnets drops accuracy to as low as chance.
For texts, what the majority class and a logistic regression on token counts reach is printed below: whoever is not better has
not learnt to read. Leaves evaluation.json in the run's folder. Library: training.stages.evaluate (training.evaluation).
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from superserve_jax import cli, files
from superserve_jax.training import stages
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      run: the run's folder.
      json: write the accuracies to this file, too.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    run = Run.open(options.run)
    served = stages.evaluate(run)
    cli.print_table(stages.table(served))
    for name, accuracy in stages.baselines(run).items():
        print(f"to compare: {name}, {100 * accuracy:.2f} %")
    if options.json:
        files.write_json(options.json, [s.to_json() for s in served])
    print(f"go on with `python train/export.py {run.workdir}`")


if __name__ == "__main__":
    cli.run(main)
