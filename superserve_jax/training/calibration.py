"""Calibration: the SubnetNorm statistics of subnets, a mean and a variance per channel, from passes over training data.

With shared statistics, subnets lose most of their accuracy (SuperServe, section 3.2). A subnet's own statistics are about 500
times smaller than the weights. The masked program computes them for any subnet with one compilation.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Params, Program
from superserve_jax.supernets.supernet import SuperNet

_BATCH_SIZE = 256


def calibrate(model: SuperNet, subnet_list: Iterable[Subnet], images: np.ndarray | jax.Array) -> dict[Subnet, np.ndarray]:
    """Statistics of each subnet over training images.

    Every layer normalises by the statistics of its batch. The batches are then pooled exactly:
    variance = mean of the variances + variance of the means.

    Args:
      model: the SuperNet; it is not changed.
      subnet_list: the subnets to calibrate.
      images: raw training inputs (N, ...). A partial last batch is left out unless it is the only one.

    Returns:
      {subnet: float32 (2, n) of means and variances}, as in `SuperNet.statistics`.

    Raises:
      ConfigError: there are fewer than two images, or the statistics are not finite.
    """
    if len(images) < 2:
        raise errors.ConfigError(f"calibration needs 2 or more training examples, got {len(images)}")
    batch_size = min(_BATCH_SIZE, len(images))
    program = programs.masked(model.config)
    if not program.offsets:  # a family without batch statistics
        return {subnet: np.zeros((2, 0), np.float32) for subnet in subnet_list}
    starts = range(0, len(images) - batch_size + 1, batch_size)
    result = {}
    for subnet in subnet_list:
        active = program.active(subnet)
        batches = np.stack([_statistics(program, model.params, images[i : i + batch_size], active) for i in starts])
        mean, var = batches[:, 0], batches[:, 1]
        pooled = np.stack([mean.mean(0), var.mean(0) + mean.var(0)]).astype(np.float32)
        result[subnet] = program.cut_statistics(pooled, subnet)
        if not np.isfinite(result[subnet]).all():
            raise errors.ConfigError(
                "statistics are not finite: the parameters or images hold NaN; train again with a lower lr"
            )
    return result


@functools.partial(jax.jit, static_argnums=0)
def _statistics(program: Program, params: Params, images: jax.Array, active: jax.Array) -> jax.Array:
    return program.train(params, images, active)[1]
