"""Sizes of a smaller network: how long an axis is, which of its entries count, and how an array is cut.

`Sizes` gives each leaf (see `dims.py`) an `ops.Size`: an int, or a pair of a static limit and a traced active size. A leaf
without an entry keeps its whole size. A smaller network has the first entries of every leaf. So the entries of a product or
a sum that remain need not be its first ones:

    >>> from superserve_jax.tracing.dims import Dim, product, total
    >>> q, k = Dim(4), Dim(4)
    >>> sizes = Sizes({q: 2, k: 4})
    >>> sizes.take(jnp.arange(8), 0, total([q, k])).tolist()
    [0, 1, 4, 5, 6, 7]
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from superserve_jax import ops
from superserve_jax.tracing.dims import Dim, factors, leaves, resolve, terms


def positions(dim: Dim, sizes: Mapping[Dim, int], limits: Mapping[Dim, int]) -> np.ndarray:
    """Where the entries of a smaller axis are in memory, int (active,). All sizes are ints; see `Sizes`.

    >>> from superserve_jax.tracing.dims import Dim, product
    >>> heads, features = Dim(2), Dim(3)
    >>> positions(product([heads, features]), {features: 2}, {}).tolist()
    [0, 1, 3, 4]
    """
    dim = resolve(dim)
    if dim.kind == "leaf":
        return np.arange(sizes.get(dim, dim.size))
    inner = [positions(part, sizes, limits) for part in dim.parts]
    at = Sizes(limits)
    lengths = [at.limit(part) for part in dim.parts]
    if dim.kind == "sum":
        begins = itertools.accumulate(lengths, initial=0)
        return np.concatenate([part + begin for part, begin in zip(inner, begins, strict=False)])
    whole = inner[0]
    for part, length in zip(inner[1:], lengths[1:], strict=True):
        whole = (whole[:, None] * length + part[None, :]).reshape(-1)
    return whole


def entries_of(dim: Dim, leaf: Dim) -> np.ndarray:
    """The entries of an axis by the entry of one of its leaves that they belong to, int (size of the leaf, number).

    >>> from superserve_jax.tracing.dims import Dim, product
    >>> heads, features = Dim(2), Dim(3)
    >>> entries_of(product([heads, features]), features).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    numbers = _numbers(dim, resolve(leaf))
    return np.stack([np.flatnonzero(numbers == i) for i in range(resolve(leaf).size)])


def _numbers(dim: Dim, leaf: Dim) -> np.ndarray:
    """For each entry of an axis, the entry of `leaf` that it belongs to, or -1."""
    dim = resolve(dim)
    if dim.kind == "leaf":
        return np.arange(dim.size) if dim is leaf else np.full(dim.size, -1)
    inner = [_numbers(part, leaf) for part in dim.parts]
    if dim.kind == "sum":
        return np.concatenate(inner)
    whole = inner[0]
    for part in inner[1:]:
        whole = np.maximum(whole[:, None], part[None, :]).reshape(-1)
    return whole


class Sizes:
    """The size of every leaf.

    Args:
      sizes: the sizes of some leaves. All other leaves keep their whole sizes.
    """

    def __init__(self, sizes: Mapping[Dim, ops.Size]):
        self._sizes = {resolve(leaf): size for leaf, size in sizes.items()}

    def limit(self, dim: Dim) -> int:
        """The static length of an axis in memory.

        >>> from superserve_jax.tracing.dims import Dim
        >>> axis = Dim(8)
        >>> Sizes({axis: (6, jnp.int32(3))}).limit(axis)
        6
        """
        dim = resolve(dim)
        if dim.kind == "leaf":
            return ops.limit(self._sizes.get(dim, dim.size))
        limits = [self.limit(part) for part in dim.parts]
        return math.prod(limits) if dim.kind == "product" else sum(limits)

    def active(self, dim: Dim) -> int | jax.Array:
        """How many entries of an axis count: an int if it is known now, else a traced int32.

        >>> from superserve_jax.tracing.dims import Dim
        >>> axis = Dim(8)
        >>> Sizes({axis: 3}).active(axis), int(Sizes({axis: (6, jnp.int32(3))}).active(axis))
        (3, 3)
        """
        dim = resolve(dim)
        if dim.kind == "leaf":
            size = self._sizes.get(dim, dim.size)
            return size if isinstance(size, int) else size[1]
        active = [self.active(part) for part in dim.parts]
        return math.prod(active) if dim.kind == "product" else sum(active)

    def is_traced(self, dim: Dim) -> bool:
        """Whether some entries of an axis may be in memory that do not count."""
        return any(not isinstance(self._sizes.get(leaf, 0), int) for leaf in leaves(dim))

    def mask(self, dim: Dim) -> jax.Array:
        """Which entries of an axis count, bool (limit,).

        >>> from superserve_jax.tracing.dims import Dim, product
        >>> heads, features = Dim(2), Dim(3)
        >>> Sizes({features: (3, jnp.int32(2))}).mask(product([heads, features])).tolist()
        [True, True, False, True, True, False]
        """
        dim = resolve(dim)
        if not self.is_traced(dim):
            return jnp.ones(self.limit(dim), bool)
        if dim.kind == "leaf":
            return lax.iota(jnp.int32, self.limit(dim)) < self.active(dim)
        masks = [self.mask(part) for part in dim.parts]
        if dim.kind == "sum":
            return jnp.concatenate(masks)
        whole, *rest = masks
        for mask in rest:
            whole = (whole[:, None] & mask[None, :]).reshape(-1)
        return whole

    def take(self, x: jax.Array, axis: int, dim: Dim) -> jax.Array:
        """Cuts one axis of an array of the whole network to its limit."""
        dim = resolve(dim)
        if self.limit(dim) == dim.size:
            return x
        if dim.kind == "leaf":
            return lax.slice_in_dim(x, 0, self.limit(dim), axis=axis)
        if dim.kind == "product":
            shape = x.shape
            x = x.reshape(*shape[:axis], *(part.size for part in dim.parts), *shape[axis + 1 :])
            for i, part in enumerate(dim.parts):
                x = self.take(x, axis + i, part)
            return x.reshape(*shape[:axis], self.limit(dim), *shape[axis + 1 :])
        ends = list(itertools.accumulate(part.size for part in dim.parts))
        pieces = [lax.slice_in_dim(x, end - part.size, end, axis=axis) for end, part in zip(ends, dim.parts, strict=True)]
        return jnp.concatenate([self.take(piece, axis, part) for piece, part in zip(pieces, dim.parts, strict=True)], axis)

    def cut(self, x: jax.Array, dims: Sequence[Dim]) -> jax.Array:
        """Cuts all axes of an array of the whole network to their limits. One slice if the remaining entries are the first."""
        limits = tuple(map(self.limit, dims))
        if limits == x.shape:
            return x
        if all(map(self._keeps_first, dims)):
            return lax.slice(x, (0,) * x.ndim, limits)
        for axis, dim in enumerate(dims):
            x = self.take(x, axis, dim)
        return x

    def _keeps_first(self, dim: Dim) -> bool:
        """Whether the remaining entries of an axis are its first ones."""
        dim = resolve(dim)
        if dim.kind == "leaf" or self.limit(dim) == dim.size:
            return True
        is_whole = [self.limit(part) == part.size for part in dim.parts]
        if dim.kind == "sum":
            return all(is_whole[:-1]) and self._keeps_first(dim.parts[-1])
        longer = (i for i, part in enumerate(dim.parts) if self.limit(part) > 1)
        first = next(longer, len(dim.parts) - 1)  # a factor of which one entry remains does not move the others
        return all(is_whole[first + 1 :]) and self._keeps_first(dim.parts[first])

    def position(self, dim: Dim, start: int) -> int:
        """Where entry `start` of an axis of the whole network is in memory. Only entries at which a cut is possible.

        >>> from superserve_jax.tracing.dims import Dim, total
        >>> q, k = Dim(4), Dim(4)
        >>> Sizes({q: 2}).position(total([q, k]), 4)
        2
        """
        dim = resolve(dim)
        if start == 0:
            return 0
        if start == dim.size:
            return self.limit(dim)
        if dim.kind == "sum":
            at = to = 0
            for part in terms(dim):
                if at + part.size > start:
                    return to + self.position(part, start - at)
                at, to = at + part.size, to + self.limit(part)
        if dim.kind == "product" and self.limit(dim) != dim.size:
            first = factors(dim)[0]
            return self.position(first, start // (dim.size // first.size)) * (self.limit(dim) // self.limit(first))
        return start
