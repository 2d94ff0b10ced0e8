"""Finds which axes of a program are the same, by the rules of its operations."""

import jax
import numpy as np
from jax.core import Tracer

from superserve_jax.tracing.dims import fix
from superserve_jax.tracing.graph import Graph, Value
from superserve_jax.tracing.rules import rule_of


def relate(graph: Graph) -> None:
    """Unifies and fixes the dims of all values of a graph and of its bodies."""
    for value, constant in graph.constants.items():
        _fix_constant(value, constant)
    for node in graph.nodes:
        for body in node.bodies:
            relate(body)
        rule_of(node.name).relate(node)


def _fix_constant(value: Value, constant: jax.Array) -> None:
    """A constant array keeps its sizes, except along axes where all its entries are equal.

    For another size, the code may make other numbers. An example are the slopes of ALiBi.
    """
    traced = isinstance(constant, Tracer)
    numbers = np.zeros(0) if traced or not isinstance(value.dtype, np.dtype) else np.asarray(constant)
    for axis, dim in enumerate(value.dims):
        if numbers.size == 0 or (numbers != np.take(numbers, [0], axis)).any():
            fix(dim, f"an array of shape {value.shape} that the function makes without its parameters")
