"""Counts the multiply-adds of a trace at other sizes, and finds the values that it reads."""

import math
from collections.abc import Iterator, Mapping

from superserve_jax.tracing.graph import Graph, Node, Value
from superserve_jax.tracing.sizes import Sizes
from superserve_jax.tracing.traced import Traced


def running(traced: Traced, gates: Mapping[str, int]) -> list[Node]:
    """The nodes of the outermost graph that run if the blocks with gate 0 are left out."""
    return _running(traced.graph, traced, gates)


def _running(graph: Graph, traced: Traced, gates: Mapping[str, int]) -> list[Node]:
    spans = [
        range(block.start + 1, block.stop + 1)
        for path, block in traced.blocks.items()
        if block.graph is graph and gates.get(path, 1) == 0
    ]
    return [node for i, node in enumerate(graph.nodes) if not any(i in span for span in spans)]


def read_values(traced: Traced, gates: Mapping[str, int]) -> set[Value]:
    """The values that some operation reads, or that are results."""
    found = {value for node in running(traced, gates) for value in node.inputs if isinstance(value, Value)}
    return found | {value for value in traced.graph.outputs if isinstance(value, Value)}


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
