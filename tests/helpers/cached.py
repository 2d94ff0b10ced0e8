"""Answers of executables that come from the cache, for tests of its keys and its files."""

import jax
import numpy as np
from tiny import TINY, random_images, random_params, random_statistics

from superserve_jax.engines import executables
from superserve_jax.supernets import programs


def smallest(config):
    return programs.sliced(config, config.space().smallest())


def answer(config=TINY):
    """The logits of one random image by the smallest subnet, from an executable of the cache."""
    program = smallest(config)
    made = executables.build([program], (1,), jax.devices()[0])
    [executable] = made.values()
    params = random_params(config)
    leaves = tuple(params[name] for name, _ in executable.leaves)
    statistics = random_statistics(config, program.envelope)
    return np.asarray(executable.call(leaves, random_images(config, 1), statistics, np.zeros(0, np.int32)))
