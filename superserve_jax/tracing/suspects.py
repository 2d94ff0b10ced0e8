"""Finds suspects: numbers that the code may have computed from a size.

A suspect keeps its value at other sizes, so the user should look at it. There are two sorts:

- A number. For `h * h.shape[-1] ** -0.5`, a jaxpr holds only 0.25, and not the size 16 that it came from.
- A sum over a new axis. `jnp.ones_like(x).sum(-1)` counts the entries of an axis that nothing connects with x.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from jax.core import Tracer

from superserve_jax.tracing import means
from superserve_jax.tracing.dims import Dim, leaves
from superserve_jax.tracing.graph import Graph, Node, Operand, Scalar, Value, all_graphs, all_nodes
from superserve_jax.tracing.listing import some, starred

_FORMS = {
    "n": lambda n: n,
    "1 / n": lambda n: 1 / n,
    "n ** 0.5": lambda n: n**0.5,
    "n ** -0.5": lambda n: n**-0.5,
    "n ** 0.25": lambda n: n**0.25,
    "n ** -0.25": lambda n: n**-0.25,
    "n - 1": lambda n: n - 1,
    "log(n)": math.log,
}

_Groups = tuple[tuple[str, ...], tuple[str, ...]]
"""Names of groups, and the same names with "*" for numbers of blocks."""


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A number that may have been computed from a size that can change.

    Args:
      where: file and line.
      number: its value, which is the same at all sizes.
      form: how it would follow from the size n, such as "n ** -0.5".
      size: n.
      groups: names of the groups whose sizes make up n.
      described: the same names, with "*" for the numbers of blocks if all blocks are among them.
    """

    where: str
    number: float
    form: str
    size: int
    groups: tuple[str, ...]
    described: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.number:g} may be {self.form} of n = {self.size}, the size of {some(self.described)}. "
            "It stays the same at other sizes"
        )


def find(graph: Graph, names: Mapping[Dim, str], mean: Collection[Node]) -> tuple[Suspect, ...]:
    """All suspects of a graph.

    Args:
      graph: a related graph.
      names: the name of each leaf that can change.
      mean: nodes that divide by the number of entries of a mean. Their numbers follow the sizes, so they are no suspects.
    """
    sizes = _sizes(graph, names)
    constants: dict[Operand, np.ndarray] = {v: x for inner in all_graphs(graph) for v, x in _equal_numbers(inner)}
    found = [suspect for node in all_nodes(graph) if node not in mean for suspect in _of_numbers(node, constants, sizes)]
    return tuple(dict.fromkeys([*found, *_of_new_axes(graph, names, sizes)]))


def _sizes(graph: Graph, names: Mapping[Dim, str]) -> dict[int, _Groups]:
    """The sizes of all axes that can change, and the groups of each."""
    found: dict[int, dict[str, None]] = {}
    for dim in _all_dims(graph):
        groups = {names[leaf]: None for leaf in leaves(dim) if leaf in names}
        if groups and dim.size > 1:
            found.setdefault(dim.size, {}).update(groups)
    return {size: (tuple(groups), tuple(starred(groups, set(names.values())))) for size, groups in found.items()}


def _all_dims(graph: Graph) -> Iterator[Dim]:
    for inner in all_graphs(graph):
        for node in inner.nodes:
            for operand in (*node.inputs, *node.outputs):
                yield from operand.dims


def _equal_numbers(graph: Graph) -> Iterator[tuple[Value, np.ndarray]]:
    """Constant arrays whose entries are all equal, such as `np.full(n, 1 / n)`, and their number."""
    for value, constant in graph.constants.items():
        if not isinstance(constant, Tracer) and isinstance(value.dtype, np.dtype):
            numbers = np.asarray(constant)
            if numbers.size and (numbers == numbers.flat[0]).all():
                yield value, np.asarray(numbers.flat[0])


def _of_numbers(node: Node, constants: Mapping[Operand, np.ndarray], sizes: Mapping[int, _Groups]) -> Iterator[Suspect]:
    for operand in () if node.is_activation else node.inputs:
        value = operand.value if isinstance(operand, Scalar) else constants.get(operand)
        if value is None or value.dtype == bool:
            continue
        number = abs(value)
        for size, groups in sizes.items():
            form = next((form for form, function in _FORMS.items() if means.is_near(number, function(size))), None)
            if form == "n - 1" and node.name != "div":  # such as the last index; ddof=1 divides
                continue
            if form is not None and float(number) not in (0.0, 1.0):
                yield Suspect(node.where, float(value), form, size, *groups)


def _of_new_axes(graph: Graph, names: Mapping[Dim, str], sizes: Mapping[int, _Groups]) -> Iterator[Suspect]:
    """Sums over an axis that the program makes itself, and that is as long as one that can change."""
    made = [node for node in all_nodes(graph) if node.name in ("broadcast_in_dim", "iota")]
    new = {leaf for node in made for value in node.outputs for dim in value.dims for leaf in leaves(dim)}
    given = [*graph.inputs, *(value for inner in all_graphs(graph) for value in inner.constants)]
    new -= {leaf for value in given for dim in value.dims for leaf in leaves(dim)}
    for node in all_nodes(graph):
        for dim in _reduced(node):
            if dim.size in sizes and new.issuperset(leaves(dim)) and not any(leaf in names for leaf in leaves(dim)):
                yield Suspect(node.where, float(dim.size), "n", dim.size, *sizes[dim.size])


def _reduced(node: Node) -> list[Dim]:
    """The axes over which a node sums."""
    first = node.inputs[0] if node.inputs else None
    if not isinstance(first, Value):
        return []
    if node.name.startswith("reduce_") and "axes" in node.params:
        return [first.dims[axis] for axis in node.params["axes"]]
    if node.name == "dot_general":
        return [first.dims[axis] for axis in node.params["dimension_numbers"][0][0]]
    return []
