"""A traced program as data: values, and nodes that compute values from values.

`jaxprs.py` makes a `Graph` from a jaxpr. Calls of jitted functions are inlined, so the nodes of a graph are one flat list.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from superserve_jax.tracing.dims import Dim


class Value:
    """An array that a program computes or is given.

    Args:
      shape: its shape in the whole network.
      dtype: its dtype.

    `dims` holds the dim of each axis.
    """

    __slots__ = ("dims", "dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape = tuple(shape)
        self.dtype = dtype
        self.dims = [Dim(size) for size in self.shape]

    def __repr__(self) -> str:
        return f"Value({self.dims}, {self.dtype})"


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
    """A number that the program was traced with, such as the 2 of `x / 2`."""

    value: np.ndarray

    @property
    def dims(self) -> list[Dim]:
        """A scalar has no axes."""
        return []


Operand = Value | Scalar


@dataclasses.dataclass(eq=False)
class Node:
    """One operation.

    Args:
      primitive: jax's primitive.
      params: the primitive's parameters in the whole network.
      inputs: what it reads.
      outputs: what it computes.
      where: file and line in the user's code.
      is_activation: whether a function such as `jax.nn.gelu` made it.
      bodies: functions that it calls, such as the body of a scan.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: list[Operand]
    outputs: list[Value]
    where: str
    is_activation: bool = False
    bodies: tuple["Graph", ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name, which is the key of its rule."""
        return self.primitive.name


@dataclasses.dataclass(eq=False)
class Graph:
    """A program.

    Args:
      inputs: its arguments.
      outputs: its results.
      nodes: its operations, in an order in which they can run.
      constants: arrays that the program was traced with.
    """

    inputs: list[Value]
    outputs: list[Operand]
    nodes: list[Node]
    constants: dict[Value, jax.Array]


def all_nodes(graph: Graph) -> list[Node]:
    """The nodes of a graph and of all bodies inside it."""
    inner = (body for node in graph.nodes for body in node.bodies)
    return [*graph.nodes, *(node for body in inner for node in all_nodes(body))]


def all_graphs(graph: Graph) -> list[Graph]:
    """A graph and all bodies inside it."""
    return [graph, *(inner for node in graph.nodes for body in node.bodies for inner in all_graphs(body))]
