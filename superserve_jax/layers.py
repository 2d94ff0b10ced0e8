"""Elastic layers: Flax NNX modules that hold parameters of maximum size and are called with the active sizes.

No layer has state that changes at run time. Normalisation statistics are passed in as `stats`:

- `BatchStats` computes the statistics of the batch and records them, for training and calibration;
- `StoredStats` reads the statistics that calibration made, for inference;
- `FoldedStats` is for inference with statistics that are already part of the kernels and biases.

Axis letters: B batch, H height, W width, C and D channels before and after. `h` and `w` are H and W divided by the stride.
"""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from superserve_jax import ops


class BatchStats:
    """Computes the statistics of the batch, and records them as (mean, variance) under the norm's name.

    If hidden states have the same shape in all subnets, the family also records the hidden states here, for distillation.
    """

    def __init__(self):
        self.recorded: dict[str, tuple[jax.Array, jax.Array]] = {}
        self.hidden: list[tuple[jax.Array, jax.Array]] = []  # per block: 1 if it is kept else 0, and its output

    def __call__(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance, each (C,), of `x`."""
        self.recorded[name] = ops.batch_statistics(x)
        return self.recorded[name]


class StoredStats:
    """Reads the statistics that calibration made.

    Args:
      statistics: float32 (2, N): means and variances of all norms, one norm after another.
      offsets: for each norm's name, where its channels begin.
    """

    def __init__(self, statistics: jax.Array, offsets: Mapping[str, int]):
        self.statistics, self.offsets = statistics, offsets

    def __call__(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance, each (C,), of the norm with this name."""
        start = self.offsets[name]
        part = self.statistics[:, start : start + x.shape[-1]]
        return part[0], part[1]


class FoldedStats(StoredStats):
    """Statistics for inference with folded norms. A norm in `folded` only adds its bias (see `ops.fold_norm`).

    Args:
      statistics: float32 (2, N), for the other norms.
      offsets: see `StoredStats`.
      folded: the names of the folded norms.
    """

    def __init__(self, statistics: jax.Array, offsets: Mapping[str, int], folded: Collection[str]):
        super().__init__(statistics, offsets)
        self.folded = folded


class Conv(nnx.Module):
    """A convolution without bias, NHWC, padded by half its kernel. The call takes the output's size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (kernel_size, kernel_size, in_channels, out_channels), jnp.float32))
        self.stride = stride

    def __call__(self, x: Float[Array, "B H W C"], out: ops.Size) -> Float[Array, "B h w D"]:
        """The convolution; D is the limit of `out`. Nothing is masked here, since the norm that follows masks its output."""
        kernel = ops.weight_slice(self.kernel[...], x.shape[-1], ops.limit(out))
        pad = kernel.shape[0] // 2
        return lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Linear(nnx.Module):
    """A dense layer with bias. The input may have any width up to `in_features`; the call takes the output's size."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32))

    def __call__(self, x: Float[Array, "*axes C"], out: ops.Size) -> Float[Array, "*axes D"]:
        """The output, masked beyond the active size; D is the limit of `out`."""
        n = ops.limit(out)
        kernel = ops.weight_slice(self.kernel[...], x.shape[-1], n)
        return ops.mask(x @ kernel.astype(x.dtype) + ops.weight_slice(self.bias[...], n).astype(x.dtype), out)


class SubnetNorm(nnx.Module):
    """Batch normalisation with the statistics of the subnet.

    Args:
      channels: number of channels in the largest subnet.
      name: the norm's name, unique in the network. `stats` is asked for the statistics of this name.
    """

    def __init__(self, channels: int, *, name: str):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.name = name

    def __call__(self, x: Float[Array, "*axes C"], size: ops.Size, stats: BatchStats | StoredStats) -> Float[Array, "*axes C"]:
        """Normalises the last axis of `x`, whose length is the limit of `size`."""
        n = x.shape[-1]
        bias = ops.weight_slice(self.bias[...], n)
        if isinstance(stats, FoldedStats) and self.name in stats.folded:
            return ops.mask(x + bias.astype(x.dtype), size)
        mean, var = stats(self.name, x)
        return ops.subnet_norm(x, mean, var, ops.weight_slice(self.scale[...], n), bias, size)
