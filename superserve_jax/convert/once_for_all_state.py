"""What the state dicts, the arguments and the subnet dictionaries of once-for-all's networks have in common."""

import math
from collections.abc import Collection, Mapping, Sequence
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

    Raises ConfigError for anything else.

    >>> ascending([7, 3, 5, 3]), ascending(4), ascending(range(2, 5))
    ((3, 5, 7), (4,), (2, 3, 4))
    """
    expected = f"expected a number or a list of numbers, got {values!r:.100}"
    with errors.refusing(errors.ConfigError, expected):
        found = np.atleast_1d(np.asarray(values))
    if found.ndim > 1 or found.dtype.kind not in "iuf":
        raise errors.ConfigError(expected)
    return tuple(sorted(set(found.tolist())))


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


def lists_of(arch: Mapping[str, Any], counts: Mapping[str, int], *, ignored: Collection[str]) -> dict[str, list[float]]:
    """The lists of a subnet dictionary. As in once-for-all, a single number is repeated, and a tuple or an array is a list.

    once-for-all also takes None. It then keeps the value of the subnet before. Here there is none.

    Args:
      arch: the dictionary.
      counts: the number of values of each list.
      ignored: names of other entries, which are not read.

    Raises:
      SubnetError: `arch` is no dictionary, lacks a list, or has one of other values than so many numbers.
      UnknownNameError: `arch` has another entry.

    >>> lists_of({"ks": (3, 5), "e": range(3, 5), "d": 2}, {"ks": 2, "e": 2, "d": 3}, ignored=())
    {'ks': [3, 5], 'e': [3, 4], 'd': [2, 2, 2]}
    """
    *first, last = map(repr, counts)
    known = f"{', '.join(first)} and {last}"
    if not isinstance(arch, Mapping):
        raise errors.SubnetError(f"a subnet dictionary has the entries {known}, got {arch!r}")
    for name in arch:
        errors.check_name("entry of a subnet dictionary", name, [*counts, *ignored])
    if missing := [name for name in counts if name not in arch]:
        raise errors.SubnetError(f"a subnet dictionary needs {known}; it lacks {missing}")
    return {name: _list(name, arch[name], count) for name, count in counts.items()}


def check_values(name: str, values: Sequence[float], choices: Collection[float]) -> None:
    """Raises SubnetError unless the values of a list of a subnet dictionary are among the choices."""
    if bad := [value for value in values if value not in choices]:
        raise errors.SubnetError(f"'{name}' of a subnet dictionary must be among {list(choices)}, got {bad[0]!r}")


def _list(name: str, value: Any, count: int) -> list[float]:
    """A list of `count` numbers, of a list or of one number."""
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    values: list[Any] = list(plain) if isinstance(plain, list | tuple | range) else [plain] * count
    if bad := [v for v in values if not _is_number(v)]:
        raise errors.SubnetError(f"'{name}' of a subnet dictionary must hold numbers, got {bad[0]!r}")
    if len(values) != count:
        raise errors.SubnetError(f"'{name}' of a subnet dictionary needs {count} values, got {len(values)}: {values}")
    return values


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
