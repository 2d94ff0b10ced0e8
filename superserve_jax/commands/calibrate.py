"""Computes the SubnetNorm statistics of a run's served subnets over training data.

    superserve calibrate runs/digits_resnet

Writes statistics.npz into the run's folder. Go on with `superserve evaluate`.
Library: training.stages.calibrate (training.calibration).
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from superserve_jax import cli
from superserve_jax.training import stages
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      run: the run's folder.
      json: write the sizes to this file.
    """

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    run = Run.open(options.run)
    stages.calibrate(run)
    model = run.model()
    weights = sum(p.nbytes for p in model.params.values())
    sizes = [statistics.nbytes for statistics in model.statistics.values()]
    mean = sum(sizes) / len(sizes)
    less = (
        f", {weights / mean:.0f} times less than the {weights:,} bytes of weights"
        if mean
        else ": this family has no statistics"
    )
    print(
        f"{len(sizes)} subnets calibrated on {run.config.calibration_examples} training examples: {mean:,.0f} bytes of "
        f"statistics each{less}"
    )
    cli.write_results(options.json, {"subnets": len(sizes), "statistics_bytes": sizes, "weights_bytes": weights})
    print(f"go on with `{cli.command('evaluate', run.workdir)}`")
