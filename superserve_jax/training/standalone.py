"""Subnets trained alone, each as a network of its own: against them stands what sharing weights costs."""

import dataclasses

from superserve_jax import errors
from superserve_jax.exports import Served
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.subnet import Subnet
from superserve_jax.training import loop, stages
from superserve_jax.training.config import DistillConfig, TrainConfig
from superserve_jax.training.runs import Run


def config(shared: TrainConfig, subnet: Subnet) -> TrainConfig:
    """The SuperNet's experiment with one subnet in its place: labels only; the same first weights, data, optimiser, steps."""
    model = SingleSubnetConfig(shared.model, subnet)
    alone = {"phases": (), "distill": DistillConfig(), "random_subnets": 0, "buckets": 1, "eval_every": 0}
    return dataclasses.replace(shared, model=model, **alone)


def train(run: Run, subnet: Subnet, name: str) -> Served:
    """Trains, calibrates and evaluates a subnet of a run alone, or goes on with that, in the run's folder alone/NAME.

    That folder is one of a run, too. What was finished before is only read.

    Raises:
      KeyboardInterrupt, ConfigError, DataError: as `loop.train` does.
    """
    if run.converted:
        raise errors.ConfigError(
            f"{run.workdir} began with converted weights: subnets that are trained alone from random ones say nothing about "
            f"what sharing costs it"
        )
    alone = loop.train(config(run.config, subnet), run.workdir / "alone" / name, dataset=run.given)
    if not (alone.workdir / "evaluation.json").is_file():
        # Nothing to search for in a space of one.
        alone.write("search.json", {"candidates": [], "served": [alone.config.model.space().largest().to_json()]})
        stages.calibrate(alone)
        stages.evaluate(alone)
    [measured] = alone.read("evaluation.json", made_by="train/evaluate.py")
    return Served.from_json(measured)
