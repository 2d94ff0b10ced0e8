"""Groups of axes of parameters that can only change together, and the axes that cannot change."""

import dataclasses
from collections.abc import Mapping

from superserve_jax.tracing.dims import Dim, leaves
from superserve_jax.tracing.graph import Value


@dataclasses.dataclass(frozen=True)
class Place:
    """An axis of a parameter."""

    parameter: str
    axis: int

    def __str__(self) -> str:
        return f"{self.parameter}[{self.axis}]"


@dataclasses.dataclass(frozen=True)
class Group:
    """Axes of parameters that can only change together.

    Args:
      name: one of the axes, such as "fc.kernel[1]". If that axis consists of several groups, a number follows: "qkv[1].0" and
        "qkv[1].1".
      size: the size in the whole network.
      places: all axes of parameters that this group belongs to.
      steps: the only sizes of a kernel, ascending. `()` for all other groups.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    steps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fixed:
    """An axis of a parameter, or a part of it, that keeps its size.

    Args:
      place: the axis.
      size: the size of the axis, or of the part.
      reason: why, with file and line.
    """

    place: Place
    size: int
    reason: str

    def __str__(self) -> str:
        return f"{self.place} keeps its {self.size} entries: {self.reason}"


def _parts(parameters: Mapping[str, Value]) -> list[tuple[Dim, Place, int, int]]:
    """(leaf, place, number of the leaf in its axis, number of leaves of the axis) of every axis of every parameter."""
    found = []
    for name, value in parameters.items():
        for axis, dim in enumerate(value.dims):
            inner = leaves(dim)
            found += [(leaf, Place(name, axis), i, len(inner)) for i, leaf in enumerate(inner) if leaf.size > 1]
    return found


def find(parameters: Mapping[str, Value], kernels: Mapping[Value, Dim]) -> tuple[dict[str, Dim], dict[str, Group]]:
    """The leaves of all groups, and the groups, by name.

    Args:
      parameters: the parameters of a related graph.
      kernels: the size of each parameter that `kernel_select` makes smaller kernels of. It has the parameter's name.
    """
    found: dict[Dim, list[tuple[Place, int, int]]] = {}
    for leaf, place, number, count in _parts(parameters):
        if leaf.fixed is None:
            found.setdefault(leaf, []).append((place, number, count))
    named, groups = {}, {}
    for leaf, uses in found.items():
        # The name is preferably a whole axis, of a matrix, the last one (what the matrix makes), with the shortest path.
        place, number, count = min(uses, key=lambda use: (use[2], *_rank(use[0], parameters)))
        name = str(place) if count == 1 else f"{place}.{number}"
        named[name] = leaf
        groups[name] = Group(name, leaf.size, tuple(dict.fromkeys(place for place, _, _ in uses)))
    for name, value in parameters.items():
        if value in kernels:
            size = kernels[value]
            named[name] = size
            groups[name] = Group(name, size.size, tuple(Place(name, axis) for axis in _spatial(value)), size.steps)
    return named, groups


def _spatial(kernel: Value) -> range:
    """The axes of a convolution's kernel that are not channels."""
    return range(len(kernel.shape) - 2)


def _rank(place: Place, parameters: Mapping[str, Value]) -> tuple[bool, bool, int]:
    axes = len(parameters[place.parameter].shape)
    return axes == 1, place.axis != axes - 1, place.parameter.count(".")


def fixed(parameters: Mapping[str, Value], kernels: Mapping[Value, Dim]) -> tuple[Fixed, ...]:
    """All axes of parameters that cannot change. The arguments are those of `find`."""
    found = [Fixed(place, leaf.size, leaf.fixed) for leaf, place, _, _ in _parts(parameters) if leaf.fixed is not None]
    for name, value in parameters.items():
        for axis, dim in enumerate(value.dims):
            if dim.size > 1 and all(leaf.size == 1 for leaf in leaves(dim)):
                found.append(Fixed(Place(name, axis), dim.size, "its entries are used one by one"))
    changing = {Place(name, axis) for name, value in parameters.items() if value in kernels for axis in _spatial(value)}
    return tuple(each for each in dict.fromkeys(found) if each.place not in changing)
