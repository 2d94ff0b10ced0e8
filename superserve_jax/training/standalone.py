"""Standalone training: a subnet as a network of its own, to measure what sharing weights costs in accuracy."""

import dataclasses

from superserve_jax import errors
from superserve_jax.exports import Served
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.subnet import Subnet
from superserve_jax.training import loop, stages
from superserve_jax.training.config import DistillConfig, TrainConfig
from superserve_jax.training.runs import Run


def config(shared: TrainConfig, subnet: Subnet) -> TrainConfig:
    """The SuperNet's experiment for a single subnet: only labels teach; first weights, data, optimiser and steps stay."""
    model = SingleSubnetConfig(shared.model, subnet)
    return dataclasses.replace(
        shared, model=model, phases=(), distill=DistillConfig(), random_subnets=0, buckets=1, eval_every=0
    )


def train(run: Run, subnet: Subnet, name: str) -> Served:
    """Trains, calibrates and evaluates one subnet of a run on its own, or goes on with it.

    The work is a run, too, in the folder alone/NAME of the given run. Finished parts are only read.

    Raises:
      KeyboardInterrupt, ConfigError, DataError: as in `loop.train`.
    """
    if run.converted:
        raise errors.ConfigError(
            f"{run.workdir} began with converted weights. Standalone subnets begin with random weights, so the comparison "
            f"would say nothing about sharing; choose a run that was trained from random weights"
        )
    standalone = loop.train(config(run.config, subnet), run.workdir / "alone" / name, dataset=run.given)
    if not (standalone.workdir / "evaluation.json").is_file():
        # A space of one subnet needs no search.
        only = standalone.config.model.space().largest()
        standalone.write("search.json", {"candidates": [], "served": [only.to_json()]})
        stages.calibrate(standalone)
        stages.evaluate(standalone)
    [measured] = standalone.read("evaluation.json", made_by="train/evaluate.py")
    return Served.from_json(measured)
