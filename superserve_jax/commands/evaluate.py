"""Measures test accuracies of a run's served subnets, with their own statistics and with the largest subnet's.

    superserve evaluate runs/digits_resnet
    superserve evaluate runs/digits_resnet --bfloat16

The accuracies come from one half of the test split, chosen by `training.data.halves`. They become the profiled accuracies of
the export. `superserve replay` sends the other half. The line below the table gives the standard error of an accuracy.

The column "with the largest's statistics" shows why the paper needs SubnetNorm: with one set of statistics for all subnets,
accuracy falls, in some subnets to chance. For texts, two baselines are printed below: the majority class, and a logistic
regression on token counts. A model that does not beat them has learnt nothing about word order.

With --bfloat16, it also measures accuracies of a network that computes in bfloat16. A server with compute_dtype="bfloat16"
needs them.

Writes evaluation.json into the run's folder. Go on with `superserve export`. Library: training.stages.evaluate
(training.evaluation).
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from superserve_jax import cli
from superserve_jax.exports import Served
from superserve_jax.training import stages
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      run: the run's folder.
      bfloat16: also measure accuracies in bfloat16.
      json: write the accuracies to this file.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    bfloat16: bool = False
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    run = Run.open(options.run)
    report(run, stages.evaluate(run, bfloat16=options.bfloat16), options.json)
    print(f"go on with `{cli.command('export', run.workdir)}`")


def report(run: Run, served: list[Served], json: pathlib.Path | None) -> None:
    """Prints the accuracies of the served subnets, their standard error, and the baselines.

    Args:
      run: the run.
      served: its evaluated subnets.
      json: also write the accuracies to this file.
    """
    cli.print_table(stages.table(served))
    print(stages.precision(run, served))
    for name, accuracy in stages.baselines(run).items():
        print(f"to compare: {name}, {100 * accuracy:.2f} %")
    cli.write_results(json, [s.to_json() for s in served])
