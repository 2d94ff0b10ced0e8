"""SubNetAct's three operators as pure functions: LayerSelect, WeightSlice, SubnetNorm (SuperServe, NSDI 2025, section 3).

A fourth one is KernelSelect, the elastic kernel size of once-for-all (Cai et al., ICLR 2020, section 3.3).

The type of a `Size` decides how an operator runs:

- A Python int (**sliced**): the weight is sliced to that static size. Nothing is masked.
- A pair (limit, active) of a static int and a traced int32 scalar (**bucketed**): the weight is sliced to the limit, and all
  channels beyond the active size are set to zero. If the limit is the size of the whole network, this is called **masked**.

Both forms give equal results because of one invariant: every activation is zero beyond its active channels. So a layer needs
to know only its own size, never the size of its input.

Axis letters: C channels; `*axes` any axes before them.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

Size = int | tuple[int, jax.Array]
EPS = 1e-5
"""SubnetNorm adds it to a variance, to avoid a division by zero."""


def limit(size: Size) -> int:
    """The static number of channels that an array of this size has in memory.

    >>> limit(8), limit((16, jnp.int32(8)))
    (8, 16)
    """
    return size if isinstance(size, int) else size[0]


def mask(x: Num[Array, "*axes C"], size: Size) -> Num[Array, "*axes C"]:
    """Sets the last axis to zero beyond the active size. Changes nothing if the size is an int.

    >>> mask(jnp.ones(3), (3, jnp.int32(2))).tolist()
    [1.0, 1.0, 0.0]
    """
    if isinstance(size, int):
        return x
    keep = lax.iota(jnp.int32, x.shape[-1]) < size[1]
    return jnp.where(keep, x, jnp.zeros((), x.dtype))


def weight_slice(weight: jax.Array, *limits: int) -> jax.Array:
    """WeightSlice: the first `limits` entries of the last `len(limits)` axes.

    >>> weight_slice(jnp.ones((3, 3, 8, 16)), 4, 8).shape
    (3, 3, 4, 8)
    """
    starts = (0,) * weight.ndim
    return lax.slice(weight, starts, weight.shape[: weight.ndim - len(limits)] + limits)


def layer_select(gate: Size, block: Callable[[jax.Array], jax.Array], x: jax.Array, *, skip: bool) -> jax.Array:
    """LayerSelect: `block(x)` if the gate is on, else `x`.

    A static gate, or a gate with limit 0, decides during tracing, so a dropped block costs nothing. For other gates:

    - `skip=True` branches, so a dropped block costs nothing. Use it for inference.
    - `skip=False` always computes the block and then selects. Use it for training: on a CPU the gradient of a convolution
      inside a branch is about 30 times slower, and a branch cannot return the statistics of the batch.
    """
    if isinstance(gate, int):
        return block(x) if gate else x
    if gate[0] == 0:
        return x
    if skip:
        return lax.cond(gate[1] > 0, block, lambda x: x, x)
    return jnp.where(gate[1] > 0, block(x), x)


def kernel_select(kernel: jax.Array, transforms: Mapping[int, jax.Array | None], size: Size) -> jax.Array:
    """KernelSelect: a kernel of another size, made of a large one.

    The centre of a kernel, times a matrix, is the next smaller kernel. So a kernel of 7x7 gives one of 5x5, and that one gives
    one of 3x3. All channels share the matrices. They are summed without a matrix product, so they keep float32's precision.

    Args:
      kernel: n spatial axes of one size K, and then the axes of the input and the output channels.
      transforms: {a smaller size k: a matrix (k^n, k^n) of the flattened kernel, or None for the centre alone}.
      size: K, or a size of `transforms`. An int k gives a kernel of this size. A pair (limit, active) gives a kernel as large
        as the limit, with the kernel of the active size in its centre and zeros around it.

    >>> kernel_select(jnp.arange(5.0).reshape(5, 1, 1), {3: 2 * jnp.eye(3)}, 3).ravel().tolist()
    [2.0, 4.0, 6.0]
    >>> kernel_select(jnp.arange(5.0).reshape(5, 1, 1), {3: None}, (5, jnp.int32(3))).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0, 0.0]
    """
    top = limit(size)
    for k in sorted((k for k in transforms if top <= k < kernel.shape[0]), reverse=True):
        kernel = _smaller_kernel(kernel, k, transforms[k])
    if isinstance(size, int):
        return kernel
    selected = smaller = kernel
    for k in sorted((k for k in transforms if k < top), reverse=True):
        smaller = _smaller_kernel(smaller, k, transforms[k])
        around = [((top - k) // 2,) * 2] * (kernel.ndim - 2) + [(0, 0)] * 2
        selected = jnp.where(size[1] <= k, jnp.pad(smaller, around), selected)
    return selected


def _smaller_kernel(kernel: jax.Array, size: int, matrix: jax.Array | None) -> jax.Array:
    axes = kernel.ndim - 2
    start = (kernel.shape[0] - size) // 2
    centre = kernel[(slice(start, start + size),) * axes]
    if matrix is None:
        return centre
    flat = centre.reshape(-1, *kernel.shape[axes:]).astype(jnp.float32)
    return jnp.sum(matrix.astype(jnp.float32)[:, :, None, None] * flat, axis=1).reshape(centre.shape).astype(kernel.dtype)


def batch_statistics(x: Float[Array, "*axes C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Mean and (biased) variance of each channel over all other axes, both float32.

    >>> [v.tolist() for v in batch_statistics(jnp.array([[1.0], [3.0]]))]
    [[2.0], [1.0]]
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)


def subnet_norm(
    x: Float[Array, "*axes C"],
    mean: Float[Array, " C"],
    var: Float[Array, " C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    size: Size,
    *,
    eps: float = EPS,
) -> Float[Array, "*axes C"]:
    """SubnetNorm: batch normalisation with the statistics of the subnet that runs.

    The result is masked, because the norm turns a channel of zeros into bias - mean * scale / sqrt(var + eps).
    """
    y = (x.astype(jnp.float32) - mean) * (lax.rsqrt(var + eps) * scale) + bias
    return mask(y.astype(x.dtype), size)


def fold_norm(
    kernel: Float[Array, "*axes C"],
    mean: Float[Array, " C"],
    var: Float[Array, " C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    eps: float = EPS,
) -> tuple[Float[Array, "*axes C"], Float[Array, " C"]]:
    """Returns a kernel and a bias, both float32, with `conv(x, new_kernel) + new_bias == subnet_norm(conv(x, kernel))`.

    >>> one = jnp.ones(1)
    >>> kernel, bias = fold_norm(jnp.array([[3.0]]), 2 * one, 4 * one, one, 5 * one, eps=0.0)
    >>> kernel.tolist(), bias.tolist()
    ([[1.5]], [4.0])
    """
    factor = lax.rsqrt(var + eps) * scale
    return kernel.astype(jnp.float32) * factor, bias - mean * factor
