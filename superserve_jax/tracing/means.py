"""Finds the divisions of means: a sum over some axes, divided by the number of their entries in the whole network.

`jnp.mean` and `jnp.var` leave only this number in a jaxpr. At other sizes it must be the number of entries that count.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from superserve_jax.tracing.dims import Dim
from superserve_jax.tracing.graph import Graph, Node, Operand, Scalar, Value, all_graphs

_KEEPING = ("broadcast_in_dim", "convert_element_type", "copy", "name", "reshape", "squeeze", "stop_gradient", "transpose")


def find(graph: Graph) -> dict[Node, list[Dim]]:
    """The nodes that divide a sum by its number of entries, with the axes of the sum."""
    return {node: dims for inner in all_graphs(graph) for node, dims in _of_graph(inner)}


def _of_graph(graph: Graph) -> Iterator[tuple[Node, list[Dim]]]:
    sums: dict[Operand, list[list[Dim]]] = {}  # the axes of a sum; then with those of the sum that it sums
    for node in graph.nodes:
        first = node.inputs[0] if node.inputs else None
        if node.name == "reduce_sum" and isinstance(first, Value):
            axes = [first.dims[axis] for axis in node.params["axes"]]
            sums[node.outputs[0]] = [axes, *([*axes, *before] for before in sums.get(first, []))]
        elif node.name in _KEEPING and first in sums:
            sums[node.outputs[0]] = sums[first]
        elif node.name in ("div", "mul"):
            for value, number in _with_number(node):
                for axes in sums.get(value, []):
                    count = math.prod(dim.size for dim in axes)
                    if count > 1 and is_near(number, count if node.name == "div" else 1 / count):
                        yield node, axes
                        break


def _with_number(node: Node) -> Iterator[tuple[Operand, np.ndarray]]:
    """(value, number) if one of the operands is a number. The number may be on the left of a product only."""
    a, b = node.inputs
    if isinstance(b, Scalar):
        yield a, b.value
    elif isinstance(a, Scalar) and node.name == "mul":
        yield b, a.value


def is_near(number: np.ndarray, exact: float) -> bool:
    """Whether a number is `exact` after it was rounded to its dtype."""
    if not jnp.issubdtype(number.dtype, jnp.floating) and not jnp.issubdtype(number.dtype, jnp.integer):
        return False
    digits = {"bfloat16": 2**-7, "float16": 2**-10, "float64": 1e-12}.get(number.dtype.name, 1e-6)
    return math.isclose(float(number), exact, rel_tol=digits)
