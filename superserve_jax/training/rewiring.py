"""Rewiring: the most important heads, neurons and channels first, since smaller subnets run the first ones (DynaBERT's
network rewiring, Hou et al., NeurIPS 2020; once-for-all sorts channels for the same reason).

    params = rewiring.rewire(config, params, batches)       # of a network that has learnt its task, before widths are elastic

    orders = rewiring.orders(config, state.params, batches)                 # in the midst of training, the moments of the
    state = rewiring.reorder(config, state, orders)                         # optimiser move along

The largest subnet's function stays what it is; statistics are calibrated anew.

A family takes part through its config's method `units()`, the `supernets.units.Units` of every elastic width.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import RewirableConfig
from superserve_jax.supernets.programs import Program
from superserve_jax.training import losses

Params = Mapping[str, jax.Array]


def rewire(config: Any, params: Params, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, jax.Array]:
    """Parameters with the units of every width in descending order of importance.

    Args:
      config: the family's config.
      params: {dotted path: array}, trained as one network of maximum size.
      batches: training batches with "inputs" and "label", some hundred examples in all. Small batches tell more, down to one
        example without batch statistics: within a batch a unit's good and harm cancel, all the more the better trained it is.

    Raises:
      ConfigError: there is no batch, or an importance is not finite.

    >>> from superserve_jax.families.dynabert import DynaBERTConfig
    >>> config = DynaBERTConfig(num_classes=2, vocab_size=9, hidden_size=4, depths=(1,), heads=(1, 2), ffn=(2, 3))
    >>> batch = {"inputs": config.pack([[5, 7], [3, 2]], length=2), "label": np.array([0, 1], np.int32)}
    >>> params = programs.initial_params(config, 0)
    >>> sorted(rewire(config, params, [batch])) == sorted(params)
    True
    """
    return reorder(config, dict(params), orders(config, params, batches))


def orders(config: Any, params: Params, batches: Iterable[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """For each of `config.units()` its units in descending order of importance, (count,). As for `rewire`."""
    return [np.argsort(-values, kind="stable") for values in importances(config, params, batches)]


def importances(config: Any, params: Params, batches: Iterable[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """How much the largest subnet's loss would change without each unit, float64 (count,) for each of `config.units()`.

    To first order, leaving out a unit changes the loss of a batch by the sum of gradient x activation over the batch, which
    equals the sum of gradient x weight over the weights that read it. Magnitudes are summed over batches.

    Raises:
      ConfigError: as `rewire` does.
    """
    program = programs.sliced(config, config.space().largest())
    totals = [np.zeros(units.count) for units in config.units()]
    count = 0
    for batch in batches:
        for total, change in zip(totals, _changes(program, params, batch["inputs"], batch["label"]), strict=True):
            total += np.abs(np.asarray(change, np.float64))
        count += 1
    if not count:
        raise errors.ConfigError("importances need at least one batch of training data, got none")
    if not all(np.isfinite(total).all() for total in totals):
        raise errors.ConfigError("importances are not finite: the parameters or inputs hold NaN; train again with a lower lr")
    return totals


def reorder(config: Any, state: Any, orders: Sequence[np.ndarray]) -> Any:
    """A pytree in which, wherever it holds parameters or what goes with them, unit i is what was unit `order[i]`.

    Args:
      config: the family's config.
      state: parameters {dotted path: array}, or a pytree with such dicts in it: an optimiser's moments, moving averages.
      orders: one for each of `config.units()`.
    """
    names = programs.param_spec(config).keys()

    def like_params(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == names

    return jax.tree.map(lambda n: _moved(config, n, orders) if like_params(n) else n, state, is_leaf=like_params)


def _moved(config: Any, arrays: Params, orders: Sequence[np.ndarray]) -> dict[str, jax.Array]:
    moved = dict(arrays)
    for units, order in zip(config.units(), orders, strict=True):
        for name, axis in (*units.writers, units.reader):
            size = moved[name].shape[axis] // units.count
            places = (np.asarray(order)[:, None] * size + np.arange(size)).ravel()
            moved[name] = jnp.take(jnp.asarray(moved[name]), places, axis=axis)
    return moved


@functools.partial(jax.jit, static_argnums=0)
def _changes(program: Program, params: Params, inputs: jax.Array, labels: jax.Array) -> list[jax.Array]:
    """For each of the config's units the sum of gradient x weight over what reads each unit, (count,)."""

    def loss_fn(params):
        return losses.cross_entropy(program.train(params, inputs, jnp.zeros((0,), jnp.int32))[0], labels)

    grads = jax.grad(loss_fn)(params)
    changes = []
    assert isinstance(program.config, RewirableConfig)
    for units in program.config.units():
        name, axis = units.reader
        products = jnp.moveaxis(grads[name] * params[name], axis, 0)
        changes.append(jnp.sum(products.reshape(units.count, -1), 1))
    return changes
