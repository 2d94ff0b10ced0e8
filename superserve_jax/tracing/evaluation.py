"""Runs a graph at other sizes.

| sizes | arrays | operations that mix entries of an axis |
|---|---|---|
| ints (**sliced**) | have the sizes of the smaller network | need no mask |
| pairs (limit, active) (**bucketed**) | have the sizes of the limits | mask what is beyond the active size |
| the same with the limits of the whole network (**masked**) | are as large as those of the whole network | the same |

Invariant: beyond its active size, a value may hold any finite number. Parameters are zero there. So an operation on single
entries needs no mask. A sum, a product of matrices, or a maximum along an axis masks its operand first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from superserve_jax.tracing.dims import Dim
from superserve_jax.tracing.graph import Graph, Node, Operand, Value
from superserve_jax.tracing.rules import rule_of
from superserve_jax.tracing.sizes import Sizes


class Evaluation:
    """One run at some sizes. It belongs to one thread.

    Args:
      sizes: the sizes of the leaves.
      means: the nodes that divide by a number of entries, and the axes whose entries they count.
    """

    def __init__(self, sizes: Sizes, means: Mapping[Node, Sequence[Dim]]):
        self._sizes = sizes
        self._means = means
        self._zero: set[Value] = set()  # values that are zero beyond their active sizes

    def run(self, graph: Graph, inputs: Sequence[Any], zeros: Sequence[bool]) -> list[jax.Array]:
        """The outputs of a graph.

        Args:
          graph: the program.
          inputs: its arguments, cut to the limits.
          zeros: for each argument, whether it is zero beyond its active sizes.
        """
        known = dict(zip(graph.inputs, inputs, strict=True))
        self._zero.update(value for value, zero in zip(graph.inputs, zeros, strict=True) if zero)
        for value, constant in graph.constants.items():
            known[value] = self.parameter(constant, value)

        def read(operand: Operand) -> Any:
            return known[operand] if isinstance(operand, Value) else operand.value

        for node in graph.nodes:
            rule = rule_of(node.name)
            outputs = rule.evaluate(node, [read(operand) for operand in node.inputs], self)
            known.update(zip(node.outputs, outputs, strict=True))
            if rule.moves and all(map(self.is_zero_beyond, node.inputs)):
                self._zero.update(node.outputs)
        return [known[y] if isinstance(y, Value) else jnp.asarray(y.value) for y in graph.outputs]

    def parameter(self, x: jax.Array, value: Value) -> jax.Array:
        """An array of the whole network, cut to its limits, with zeros beyond its active sizes."""
        if x.shape != self.shape(value):
            x = self._sizes.cut(x, value.dims)
        x = self.mask(x, value, range(x.ndim), 0)
        self._zero.add(value)
        return x

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value in memory."""
        return tuple(map(self._sizes.limit, value.dims))

    def limit(self, dim: Dim) -> int:
        """The length of an axis in memory."""
        return self._sizes.limit(dim)

    def position(self, dim: Dim, start: int) -> int:
        """Where entry `start` of an axis of the whole network is in memory."""
        return self._sizes.position(dim, start)

    def mask(self, x: Any, operand: Operand, axes: Iterable[int], neutral: Any) -> Any:
        """`x` with `neutral` beyond the active sizes of some axes."""
        for axis in axes:
            dim = operand.dims[axis]
            if self._sizes.is_traced(dim):
                keep = self._sizes.mask(dim).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
                x = jnp.where(keep, x, jnp.asarray(neutral, x.dtype))
        return x

    def is_zero_beyond(self, operand: Operand) -> bool:
        """Whether a value is known to be zero beyond its active sizes, or has nothing there."""
        if not any(map(self._sizes.is_traced, operand.dims)):
            return True
        return isinstance(operand, Value) and operand in self._zero

    def count(self, node: Node) -> int | jax.Array | None:
        """By how many entries a mean divides. None if the node is no mean, or has the number of the whole network."""
        dims = self._means.get(node)
        if dims is None:
            return None
        count = math.prod(map(self._sizes.active, dims))
        whole = math.prod(dim.size for dim in dims)
        if isinstance(count, int):
            return None if count == whole else count
        return jnp.asarray(count, jnp.float32)
