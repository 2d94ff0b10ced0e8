"""Counts the multiply-adds of a trace at other sizes, and finds the values that it reads."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from superserve_jax.tracing import kernels
from superserve_jax.tracing.dims import Dim
from superserve_jax.tracing.graph import Graph, Node, Value
from superserve_jax.tracing.sizes import Sizes
from superserve_jax.tracing.traced import Traced


def read_values(traced: Traced, gates: Mapping[str, Any], whole: Collection[Dim] = ()) -> set[Value]:
    """The values that some operation reads, or that are results. Blocks with gate 0 read nothing.

    A kernel of one size needs no matrices. `whole` holds the sizes of kernels that need them.
    """
    return _read_values(traced.graph, traced, gates, whole)


def _read_values(graph: Graph, traced: Traced, gates: Mapping[str, Any], whole: Collection[Dim]) -> set[Value]:
    read = [*graph.outputs]
    for node in _running(graph, traced, gates):
        branches = [(node.inputs[1:], body) for body in node.bodies] if node.name == "cond" else []
        calls = branches or [(node.inputs, body) for body in node.bodies[:1]]
        is_small_kernel = node.name == kernels.NAME and kernels.size_of(node) not in whole
        read += node.inputs[:1] if branches or is_small_kernel else [] if calls else node.inputs
        for operands, body in calls:
            inner = _read_values(body, traced, gates, whole)
            read += [operand for operand, value in zip(operands, body.inputs, strict=True) if value in inner]
    return {operand for operand in read if isinstance(operand, Value)}


def _running(graph: Graph, traced: Traced, gates: Mapping[str, Any]) -> list[Node]:
    """The nodes of a graph that run if the blocks with gate 0 are left out."""
    left_out = set[int]()
    for path, block in traced.blocks.items():
        if block.graph is graph and gates.get(path, 1) == 0:
            left_out.update(range(block.start + 1, block.stop + 1))
    return [node for i, node in enumerate(graph.nodes) if i not in left_out]


def multiply_adds(traced: Traced, at: Sizes, gates: Mapping[str, int]) -> int:
    """Multiply-adds of matrix products and convolutions. Products with zero padding count. Of several branches, the
    one with the most products counts.

    Args:
      traced: the trace, at the batch size to count for.
      at: the sizes.
      gates: 0 for each block that is left out, by its path.
    """
    return sum(_counts(traced.graph, traced, at, gates))


def _counts(graph: Graph, traced: Traced, at: Sizes, gates: Mapping[str, int]) -> Iterator[int]:
    for node in _running(graph, traced, gates):
        if node.name in ("dot_general", "conv_general_dilated"):
            size = math.prod(map(at.limit, node.outputs[0].dims))
            yield size * _summed(node, at)
        elif node.name == "cond":
            yield max(sum(_counts(body, traced, at, gates)) for body in node.bodies)
        elif node.bodies:
            turns = node.params["length"] if node.name == "scan" else 1
            yield turns * sum(_counts(node.bodies[0], traced, at, gates))


def _summed(node: Node, at: Sizes) -> int:
    """The number of products that an entry of the output sums."""
    numbers = node.params["dimension_numbers"]
    if node.name == "dot_general":
        return math.prod(at.limit(node.inputs[0].dims[axis]) for axis in numbers[0][0])
    return math.prod(at.limit(node.inputs[1].dims[axis]) for axis in numbers.rhs_spec[1:])
