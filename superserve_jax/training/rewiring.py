"""Rewiring: sort heads, neurons and channels by importance, because smaller subnets run the first ones.

    orders = rewiring.orders(config, state.params, batches)
    state = rewiring.reorder(config, state, orders)             # the optimiser's moments move along

This is DynaBERT's network rewiring (Hou et al., NeurIPS 2020); once-for-all sorts channels for the same reason. The largest
subnet still computes the same function. Statistics must be calibrated again. A family lists its units in
`RewirableConfig.units`.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import RewirableConfig, UnitAxis, Units
from superserve_jax.supernets.programs import Program
from superserve_jax.training import losses
from superserve_jax.training.data import DatasetLike

Params = Mapping[str, jax.Array]

_EXAMPLES, _BATCH = 256, 32


def orders(config: RewirableConfig, params: Params, batches: Iterable[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """For each of `config.units()`, its units in descending order of importance, (count,). Arguments as in `importances`."""
    return [np.argsort(-values, kind="stable") for values in importances(config, params, batches)]


def orders_on(config: RewirableConfig, params: Params, dataset: DatasetLike, *, seed: int) -> list[np.ndarray]:
    """`orders` on the first 256 training examples of a seed."""
    # Within a batch, a unit's benefit and harm cancel. So take single examples, unless the family needs batch statistics.
    size = _BATCH if programs.masked(config).offsets else 1
    return orders(config, params, itertools.islice(dataset.train(size, seed=seed), _EXAMPLES // size))


def importances(config: RewirableConfig, params: Params, batches: Iterable[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """How much the largest subnet's loss changes without each unit, float64 (count,) for each of `config.units()`.

    To first order, the loss of a batch changes by the sum of gradient x activation of the unit. This equals the sum of
    gradient x weight over the weights that read the unit. The magnitudes are summed over batches.

    Args:
      config: the family's config.
      params: {dotted path: array}, trained as one network of maximum size.
      batches: training batches with "inputs" and "label", some hundred examples in all. Smaller batches tell more, because a
        unit's benefit and harm cancel within a batch.

    Raises:
      ConfigError: an importance is not finite.
    """
    program = programs.sliced(config, config.space().largest())
    totals = [np.zeros(units.count) for units in config.units()]
    for batch in batches:
        for total, change in zip(totals, _changes(program, params, batch["inputs"], batch["label"]), strict=True):
            total += np.abs(np.asarray(change, np.float64))
    if not all(np.isfinite(total).all() for total in totals):
        raise errors.ConfigError("importances are not finite: the parameters or inputs hold NaN; train again with a lower lr")
    return totals


def reorder(config: RewirableConfig, state: Any, orders: Sequence[np.ndarray]) -> Any:
    """A pytree in which unit i of every parameter dict is the former unit `order[i]`.

    Args:
      config: the family's config.
      state: parameters {dotted path: array}, or a pytree that holds such dicts: an optimiser's moments, moving averages.
      orders: one order for each of `config.units()`.
    """
    names = programs.param_spec(config).keys()

    def like_params(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == names

    return jax.tree.map(lambda n: _moved(config, n, orders) if like_params(n) else n, state, is_leaf=like_params)


def _moved(config: RewirableConfig, arrays: Params, orders: Sequence[np.ndarray]) -> dict[str, jax.Array]:
    moved = dict(arrays)
    for units, order in zip(config.units(), orders, strict=True):
        for name, axis, places in _places(units, (*units.writers, *units.readers), moved):
            source = np.arange(moved[name].shape[axis])
            source[places] = places[np.asarray(order)]
            moved[name] = jnp.take(jnp.asarray(moved[name]), source, axis=axis)
    return moved


def _places(units: Units, axes: Iterable[UnitAxis], params: Params) -> Iterator[tuple[str, int, np.ndarray]]:
    """(parameter, axis, places of the units along it) of some axes of units."""
    for units_axis in axes:
        length = params[units_axis.path].shape[units_axis.axis]
        yield units_axis.path, units_axis.axis, units_axis.places(units.count, length)


@functools.partial(jax.jit, static_argnums=0)
def _changes(program: Program, params: Params, inputs: jax.Array, labels: jax.Array) -> list[jax.Array]:
    """For each of the config's units, the sum of gradient x weight over the weights that read it, (count,)."""

    def loss_fn(params):
        return losses.cross_entropy(program.train(params, inputs, jnp.zeros((0,), jnp.int32))[0], labels)

    grads = jax.grad(loss_fn)(params)
    changes = []
    assert isinstance(program.config, RewirableConfig)
    for units in program.config.units():
        change = jnp.zeros(units.count)
        for name, axis, places in _places(units, units.readers, params):
            products = jnp.moveaxis(grads[name] * params[name], axis, 0)[places]
            change += jnp.sum(products.reshape(units.count, -1), 1)
        changes.append(change)
    return changes
