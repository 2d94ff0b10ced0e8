"""Validation during training: the accuracy of the smallest, a middle and the largest subnet.

Statistics and accuracies come from the examples that the search uses. So the end of a validation curve agrees with search.png.
"""

import itertools
import math
from collections.abc import Mapping

import jax
import numpy as np

from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import calibration, evaluation, sampling
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import DatasetLike
from superserve_jax.training.step import TrainState

EVAL_BATCH = 250
_TIMES = 10  # how often a run validates by default


def interval(config: TrainConfig, num_steps: int) -> int:
    """The number of steps between two validations of a run of `num_steps` steps; 0 if there are none.

    By default it is a tenth of the run, but not less than `log_every`.
    """
    return max(config.log_every, math.ceil(num_steps / _TIMES)) if config.eval_every is None else config.eval_every


class Validation:
    """Measures validation accuracies. It changes neither the training state nor the order of the training examples.

    Args:
      config: the experiment.
      dataset: the dataset. Its examples are read once and stay in memory.
    """

    def __init__(self, config: TrainConfig, dataset: DatasetLike):
        space, validate = config.last_phase.space(config.model), config.model.space().validate
        (middle,) = sampling.envelopes(config.model, 1, seed=config.seed, space=space, tied=config.last_phase.tied)
        named = {"smallest": validate(space.smallest()), "middle": validate(middle), "largest": space.largest()}
        # If training varies nothing, the three are one subnet, which is then called "largest".
        self._subnets = {name: s for s, name in {s: name for name, s in named.items()}.items()}
        self._config = config
        self._inputs, _ = dataset.arrays("train", limit=config.search.calibration_examples)
        self._batches = batches(dataset, config.search)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Accuracies by the name of the subnet, as fractions, each with the subnet's own statistics."""
        model = SuperNet(self._config.model, jax.device_put(state.ema or state.params, jax.devices()[0]))
        model.statistics = calibration.calibrate(model, self._subnets.values(), self._inputs)
        accuracies = evaluation.accuracy(model, self._subnets.values(), lambda: self._batches)
        return dict(zip(self._subnets, accuracies, strict=True))


def batches(dataset: DatasetLike, settings: SearchConfig) -> list[Mapping[str, np.ndarray]]:
    """The validation batches that the search and the validation curves use. Raises DataError if there are none."""
    return list(itertools.islice(dataset.eval("validation", EVAL_BATCH), -(-settings.examples // EVAL_BATCH)))
