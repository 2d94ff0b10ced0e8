"""SubnetNorm's statistics: mean and variance per (subnet, layer), from forward passes over training data.

Sharing one set of statistics between subnets costs most of their accuracy (SuperServe, section 3.2); a subnet's own are
about 500 times smaller than the weights. The masked program computes them for any subnet with one compilation.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Params, Program
from superserve_jax.supernets.supernet import SuperNet


def calibrate(
    model: SuperNet,
    subnet_list: Sequence[Subnet],
    images: np.ndarray | jax.Array,
    *,
    batch_size: int = 256,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[Subnet, np.ndarray]:
    """Statistics of each subnet over training images.

    Every layer is normalised by its batch's statistics; the batches' means and variances are then pooled exactly (the
    variance of the whole is the mean of the variances plus the variance of the means).

    Args:
      model: the SuperNet; it is not changed.
      subnet_list: the subnets to calibrate.
      images: raw training inputs (N, ...); a last partial batch is left out unless it is the only one.
      batch_size: at least 2.
      progress: wraps the iteration over subnets, for a progress bar.

    Returns:
      {subnet: float32 (2, n) of means and variances}, as in `SuperNet.statistics`.

    Raises:
      ConfigError: fewer than two images, or statistics that are not finite.
    """
    if len(images) < 2 or batch_size < 2:
        raise errors.ConfigError(f"statistics need batches of 2 or more, got {len(images)} images in batches of {batch_size}")
    batch_size = min(batch_size, len(images))
    program = programs.masked(model.config)
    if not program.offsets:  # a family without batch statistics
        return {subnet: np.zeros((2, 0), np.float32) for subnet in progress(subnet_list)}
    starts = range(0, len(images) - batch_size + 1, batch_size)
    rows = {}
    for subnet in progress(subnet_list):
        active = program.active(subnet)
        batches = np.stack([_row(program, model.params, images[i : i + batch_size], active) for i in starts])
        mean, var = batches[:, 0], batches[:, 1]
        row = np.stack([mean.mean(0), var.mean(0) + mean.var(0)]).astype(np.float32)
        rows[subnet] = program.cut_statistics(row, subnet)
        if not np.isfinite(rows[subnet]).all():
            raise errors.ConfigError(
                "statistics are not finite: the parameters or images hold NaN; train again with a lower lr"
            )
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _row(program: Program, params: Params, images: jax.Array, active: jax.Array) -> jax.Array:
    return program.train(params, images, active)[1]
