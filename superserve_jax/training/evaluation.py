"""Accuracy of subnets over labelled images, by the masked program: one compilation for all of them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import subnet as subnets
from superserve_jax.supernets import programs, supernet


def accuracy(
    model: supernet.SuperNet,
    subnet_list: Sequence[subnets.Subnet],
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    *,
    norm: supernet.Norm = "own",
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[float]:
    """Top-1 accuracy of each subnet, as a fraction.

    Args:
      model: with statistics for each subnet (for the largest, where `norm` is "shared").
      subnet_list: the subnets.
      batches: makes a fresh pass over the data: batches of equal shape with "inputs", "label" and "weight" (0 for padding).
      norm: whose statistics to use, see `SuperNet.row`.
      progress: wraps the iteration over subnets, for a progress bar.
    """
    program = programs.masked(model.config)
    result = []
    for subnet in progress(subnet_list):
        row, active = program.pad_row(model.row(subnet, norm=norm), subnet), program.active(subnet)
        counts = [_hits(program, model.params, b["inputs"], b["label"], b["weight"], row, active) for b in batches()]
        hits, total = np.sum(np.array(counts, np.float64), 0)
        result.append(float(hits / total))
    return result


@functools.partial(jax.jit, static_argnums=0)
def _hits(program, params, images, labels, weights, row, active) -> tuple[jax.Array, jax.Array]:
    """(weight of the images that were answered right, weight of all)."""
    right = jnp.argmax(program.infer(params, images, row, active), -1) == labels
    return jnp.sum(right * weights), jnp.sum(weights)
