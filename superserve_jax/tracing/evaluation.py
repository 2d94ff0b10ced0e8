"""Runs a graph at other sizes.

| sizes | arrays | operations that mix entries of an axis |
|---|---|---|
| ints (**sliced**) | have the sizes of the smaller network | need no mask |
| pairs (limit, active) (**bucketed**) | have the sizes of the limits | mask what is beyond the active size |
| the same with the limits of the whole network (**masked**) | are as large as those of the whole network | the same |

Invariant: beyond its active size, a value may hold any finite number. Parameters are zero there. So an operation on single
entries needs no mask. A sum, a product of matrices, or a maximum along an axis masks its operand first.

A gate tells whether a block runs. If it does not, the block's output is its input.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from superserve_jax import ops
from superserve_jax.tracing import infinities
from superserve_jax.tracing.blocks import Block
from superserve_jax.tracing.dims import Dim
from superserve_jax.tracing.folding import Foldable
from superserve_jax.tracing.graph import Graph, Node, Operand, Value
from superserve_jax.tracing.rules import rule_of
from superserve_jax.tracing.sizes import Sizes


class Evaluation:
    """One run at some sizes. It belongs to one thread.

    Args:
      sizes: the sizes of the leaves.
      means: the nodes that divide by a number of entries, and the axes whose entries they count.
      infinite: constants that are infinite, and copies of them, see `infinities.py`.
      gates: the gate of each block that may be left out. A static gate decides now.
      folded: the norms that are folded.
      skip: whether a block with a traced gate branches, as in `ops.layer_select`.
    """

    def __init__(
        self,
        sizes: Sizes,
        means: Mapping[Node, Sequence[Dim]],
        infinite: Collection[Value] = (),
        gates: Mapping[Block, ops.Size] | None = None,
        *,
        folded: Iterable[Foldable] = (),
        skip: bool = True,
    ):
        self._sizes = sizes
        self._means = means
        self._infinite = infinite
        self._gates = {block.graph.nodes[block.start]: (block, gate) for block, gate in (gates or {}).items()}
        self._skip = skip
        folded = list(folded)
        self._left_out = frozenset[Node]().union(*(norm.nodes for norm in folded))
        self._instead: dict[Operand, Operand] = {norm.scaled: norm.convolved for norm in folded}
        self._zero: set[Value] = set()  # values that are zero beyond their active sizes
        self._top: Graph | None = None
        self.left: dict[str, jax.Array] = {}
        """The outputs of the blocks with gates, by path, without those inside of a scan."""

    def run(self, graph: Graph, inputs: Sequence[Any], zeros: Sequence[bool]) -> list[jax.Array]:
        """The outputs of a graph. Outputs that only a left-out block computes are zeros.

        Args:
          graph: the program.
          inputs: its arguments, cut to the limits.
          zeros: for each argument, whether it is zero beyond its active sizes.
        """
        return self.run_with(graph, {}, inputs, zeros)

    def run_with(
        self, graph: Graph, whole: Mapping[Value, Any], inputs: Sequence[Any], zeros: Sequence[bool]
    ) -> list[jax.Array]:
        """As `run`. The first arguments are arrays of the whole network, which are cut when an operation reads them."""
        self._top = self._top or graph
        rest = [value for value in graph.inputs if value not in whole]
        known = _Known(self, {**whole, **graph.constants}, dict(zip(rest, inputs, strict=True)))
        self._zero.update(value for value, zero in zip(rest, zeros, strict=True) if zero)
        self._run(graph, 0, len(graph.nodes), known)
        return [self._output(y, known) for y in graph.outputs]

    def _output(self, operand: Operand, known: "_Known") -> jax.Array:
        """An output. Zeros if only a block that was left out computes it."""
        if isinstance(operand, Value) and not known.has(operand):
            return jnp.zeros(self.shape(operand), operand.dtype)
        return jnp.asarray(known.read(operand))

    def _run(self, graph: Graph, start: int, stop: int, known: "_Known") -> None:
        """Runs the nodes from `start` to before `stop`."""
        while start < stop:
            node = graph.nodes[start]
            self._run_node(node, known)
            if node in self._gates:
                block, gate = self._gates[node]
                self._run_block(block, gate, known)
                start = block.stop
            start += 1

    def _run_node(self, node: Node, known: "_Known") -> None:
        if node in self._left_out:
            return
        rule = rule_of(node.name)
        values = [known.read(self._instead.get(operand, operand)) for operand in node.inputs]
        if not infinities.copies(node):  # what computes with infinite numbers must get finite ones beyond the active size
            for i, (operand, x) in enumerate(zip(node.inputs, values, strict=True)):
                if operand in self._infinite:
                    values[i] = self.mask(x, operand, range(x.ndim), 0)
        outputs = rule.evaluate(node, values, self)
        known.values.update(zip(node.outputs, outputs, strict=True))
        if rule.moves and all(map(self.is_zero_beyond, node.inputs)):
            self._zero.update(node.outputs)

    def _run_block(self, block: Block, gate: ops.Size, known: "_Known") -> None:
        """Runs what follows the first mark of a block, if its gate is on. The paper calls this LayerSelect."""
        entered = block.graph.nodes[block.start].outputs[0]
        keeps_zero = self.is_zero_beyond(entered)

        def run(x: jax.Array) -> jax.Array:
            inner = known.copy() if not isinstance(gate, int) and self._skip else known
            inner.values[entered] = x
            self._run(block.graph, block.start + 1, block.stop + 1, inner)
            return inner.read(block.left)

        left = ops.layer_select(gate, run, known.read(entered), skip=self._skip)
        known.values[block.left] = left
        if block.graph is self._top:  # values inside of a scan cannot be read from outside
            self.left[block.path] = left
        passes, runs = gate != 1, gate != 0
        is_zero = (not passes or keeps_zero) and (not runs or self.is_zero_beyond(block.left))
        (self._zero.add if is_zero else self._zero.discard)(block.left)

    def parameter(self, x: Any, value: Value) -> jax.Array:
        """An array of the whole network, cut to its limits, with zeros beyond its active sizes.

        A kernel may have been made smaller before, see `kernels.py`.
        """
        if any(now > then for now, then in zip(x.shape, self.shape(value), strict=True)):
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

    def size(self, dim: Dim) -> ops.Size:
        """The limit of an axis, or a pair of its limit and its traced active size."""
        active = self._sizes.active(dim)
        return active if isinstance(active, int) else (self.limit(dim), active)

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


class _Known:
    """The arrays that a run knows so far.

    Args:
      evaluation: cuts arrays of the whole network.
      whole: arrays of the whole network, or cut ones. They are cut when they are first read. One that no operation reads need
        not be an array.
      values: all other arrays.
    """

    def __init__(self, evaluation: Evaluation, whole: Mapping[Value, Any], values: dict[Value, Any]):
        self._evaluation, self._whole, self.values = evaluation, whole, values

    def has(self, operand: Operand) -> bool:
        """Whether an operand is known."""
        return not isinstance(operand, Value) or operand in self.values or operand in self._whole

    def read(self, operand: Operand) -> Any:
        """The array of an operand."""
        if not isinstance(operand, Value):
            return operand.value
        if operand not in self.values:
            self.values[operand] = self._evaluation.parameter(self._whole[operand], operand)
        return self.values[operand]

    def copy(self) -> "_Known":
        """The same, for a branch, whose values must not be read outside of it."""
        return _Known(self._evaluation, self._whole, dict(self.values))
