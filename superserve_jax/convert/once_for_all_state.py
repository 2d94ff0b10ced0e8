"""What the state dicts and the arguments of once-for-all's networks have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet

CLASSIFIER = ("classifier.linear.linear", "classifier.linear")
"""The possible names of the classifier. Elastic layers hold the layer once more."""


def ascending(values: Sequence[Any] | float) -> tuple[Any, ...]:
    """The different values of an argument that is a list or a single number, ascending.

    >>> ascending([7, 3, 5, 3]), ascending(4)
    ((3, 5, 7), (4,))
    """
    return tuple(sorted(set(np.atleast_1d(np.asarray(values)).tolist())))


def pixel_options(mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
    """The fields of a config for raw pixels, or for normalised images if `mean` and `std` are None.

    Raises:
      ConfigError: only one of them is given.
    """
    if (mean is None) != (std is None):
        raise errors.ConfigError(f"give mean and std together, or neither; got mean={mean} and std={std}")
    if mean is None or std is None:
        return {"input_dtype": "float32"}
    return {"mean": tuple(mean), "std": tuple(std)}


def num_classes(weights: Mapping[str, np.ndarray]) -> int:
    """The number of outputs of the classifier. If there is no classifier, a later error says so."""
    shapes = [weights[n].shape for p in CLASSIFIER for n in (f"{p}.bias", f"{p}.weight") if n in weights]
    return next((shape[0] for shape in shapes if shape and shape[0]), 1000)


def supernet(config: FamilyConfig, found: dict[str, np.ndarray]) -> SuperNet:
    """The SuperNet with these weights. The running statistics `NORM.mean` and `NORM.var` are those of the largest subnet."""
    largest = config.space().largest()
    norms = config.norm_sizes(config.sizes(largest))
    statistics = np.concatenate([np.stack([found.pop(f"{n}.mean"), found.pop(f"{n}.var")]) for n in norms], axis=1)
    return SuperNet(config, {name: jnp.array(value) for name, value in found.items()}, {largest: statistics})
