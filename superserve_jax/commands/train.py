"""Trains a SuperNet from a config, then searches, calibrates, evaluates and exports it.

    superserve train digits_resnet
    superserve train digits_resnet --optim.lr 0.01 --epochs 3 --workdir runs/mine
    superserve train my_config.py
    superserve train runs/reviews-subnets

A config is a Python file, or the name of one that comes with the package (configs/ in the repository). A run's folder stands
for the run's own config, for example to train converted weights further. `superserve train CONFIG --help` lists the options.
Ctrl-C keeps the work; the same command goes on from there. The result is a run's folder (runs/NAME by default) with metrics,
plots, checkpoints and export/. Library: training.loop.train, then search, calibrate, evaluate and export in training.stages.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

import superserve_jax as ss
from superserve_jax import cli, files, manifest
from superserve_jax.commands import evaluate
from superserve_jax.training import stages
from superserve_jax.training.config import TrainConfig, load_config
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: the experiment; an option can override every field of the config file.
      workdir: the run's folder; runs/NAME if left out.
      train_only: stop after training.
      json: write the served subnets' accuracies to this file.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    workdir: pathlib.Path | None = None
    train_only: bool = False
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    _, options = cli.options_after_path(_defaults, __doc__)
    run = ss.train(options.config, options.workdir or pathlib.Path("runs") / options.config.name)
    if options.train_only:
        print(f"trained: {run.workdir}; go on with `{cli.command('search', run.workdir)}`")
        return
    stages.search(run)
    stages.calibrate(run)
    served = stages.evaluate(run)
    path = stages.export(run)
    evaluate.report(run, served, options.json)
    print(
        f"metrics and plots: {run.workdir}\nexport: {path}; measure its latencies with `{cli.command('measure', path)}`, then "
        f"try it with `{cli.command('replay', path)}`, or serve it from Python: superserve_jax.Server({str(path)!r})"
    )


def _defaults(path: str) -> Options:
    if not manifest.is_run(files.user_path(path)):
        return Options(load_config(path))
    run = Run.open(path)
    return Options(run.config, workdir=run.workdir)
