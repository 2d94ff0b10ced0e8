"""Finds constants that are infinite or not a number, such as the -inf of `jnp.where(keep, x, -jnp.inf)`.

Beyond its active size, a value must be finite: a masked weight is zero there, and zero times infinity is not a number.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from superserve_jax.tracing.graph import Graph, Node, Operand, Scalar, Value, all_graphs
from superserve_jax.tracing.rules import rule_of

_COPYING = ("broadcast_in_dim", "pad", "tile")


def find(graph: Graph) -> frozenset[Value]:
    """The values of a graph and of its bodies that are such constants, or copies of them."""
    found: set[Value] = set()
    for inner in all_graphs(graph):
        found.update(value for value, constant in inner.constants.items() if not _is_finite(constant))
        for node in inner.nodes:
            if copies(node) and any(_is_infinite(operand, found) for operand in node.inputs):
                found.update(node.outputs)
    return frozenset(found)


def copies(node: Node) -> bool:
    """Whether the entries of a node's outputs are those of its operands."""
    return rule_of(node.name).moves or node.name in _COPYING


def _is_infinite(operand: Operand, found: Collection[Value]) -> bool:
    return not _is_finite(operand.value) if isinstance(operand, Scalar) else operand in found


def _is_finite(numbers: Any) -> bool:
    if isinstance(numbers, Tracer) or not jnp.issubdtype(numbers.dtype, jnp.inexact):
        return True
    return bool(np.isfinite(np.asarray(numbers)).all())
