"""Standalone training: trains a subnet as a separate network, to measure how much accuracy sharing weights costs."""

import dataclasses

from superserve_jax import errors
from superserve_jax.exports import Served
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.subnet import Subnet
from superserve_jax.training import loop, stages
from superserve_jax.training.config import DistillConfig, TrainConfig
from superserve_jax.training.runs import Run


def config(shared: TrainConfig, subnet: Subnet) -> TrainConfig:
    """The SuperNet's config for a single subnet that learns from labels only.

    Initial weights, data, optimiser and number of steps stay the same.
    """
    model = SingleSubnetConfig(shared.model, subnet)
    return dataclasses.replace(
        shared, model=model, phases=(), distill=DistillConfig(), random_subnets=0, buckets=1, eval_every=0
    )


def train(run: Run, subnet: Subnet, name: str) -> Served:
    """Trains, calibrates and evaluates one subnet of a run as a standalone network.

    This makes another run, in the folder alone/NAME of the given run. An interrupted one goes on; a finished one is only read.

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
