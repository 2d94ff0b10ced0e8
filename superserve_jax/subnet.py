"""A subnet: one network inside a SuperNet. No jax.

A subnet is the paper's control tuple (D, W). D has one gate per block, which LayerSelect reads. W has one choice per position
of each elastic axis, which WeightSlice reads. `space.py` defines the search space that subnets come from.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from superserve_jax import errors


@dataclasses.dataclass(frozen=True)
class Subnet:
    """One network inside a SuperNet. Hashable. `SearchSpace.subnet` makes one.

    Args:
      gates: 1 for each kept block, 0 for each dropped one.
      axes: pairs of an axis's name and its choices, one choice per position.

    >>> a = Subnet((1, 0), (("width", (0.5,)),))
    >>> a["width"], a.covers(Subnet((0, 0), (("width", (0.5,)),)))
    ((0.5,), True)
    """

    gates: tuple[int, ...]
    axes: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self):
        # Serving looks subnets up in dictionaries for every batch. Hashing long tuples each time would cost microseconds.
        try:
            object.__setattr__(self, "_hash", hash((self.gates, self.axes)))
        except TypeError as e:
            raise errors.SubnetError(
                f"gates and axes must be tuples, got {self.gates!r} and {self.axes!r}; use SearchSpace.subnet ({e})"
            ) from e

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        """One line. A choice that repeats is written once, with how often.

        >>> Subnet((1, 0, 1), (("expand", (0.5, 0.5, 1.0)), ("width", (0.75,))))
        Subnet(gates 101, expand 0.5x2 1.0, width 0.75)
        """
        parts = [f"gates {''.join(map(str, self.gates))}"]
        for name, values in self.axes:
            runs = ((value, len(list(same))) for value, same in itertools.groupby(values))
            parts.append(" ".join([name, *(f"{value}x{count}" if count > 1 else f"{value}" for value, count in runs)]))
        return f"Subnet({', '.join(parts)})"

    def __reduce__(self):
        return Subnet, (self.gates, self.axes)  # without the hash, since hashes of strings differ between processes

    def __getitem__(self, axis: str) -> tuple[float, ...]:
        for name, values in self.axes:
            if name == axis:
                return values
        raise errors.unknown_name("axis", axis, [name for name, _ in self.axes])

    def computed_in(self, envelope: "Subnet") -> "Subnet":
        """The work that a program of `envelope` does for this subnet: the subnet's gates with the envelope's choices.

        >>> Subnet((1, 0), (("width", (0.5,)),)).computed_in(Subnet((1, 1), (("width", (1.0,)),)))
        Subnet(gates 10, width 1.0)
        """
        return Subnet(self.gates, envelope.axes)

    @errors.refusing(errors.SubnetError, "both subnets must be of one search space")
    def covers(self, other: "Subnet") -> bool:
        """Whether this subnet has every block and every channel of `other`."""
        return all(a >= b for a, b in zip(self.gates, other.gates, strict=True)) and all(
            a >= b
            for (_, mine), (_, theirs) in zip(self.axes, other.axes, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of lists, for `json.dump`."""
        return {"gates": list(self.gates), **{name: list(values) for name, values in self.axes}}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Subnet":
        """The inverse of `to_json`: ints stay ints. Raises SubnetError if `data` does not have this form."""
        with errors.refusing(errors.SubnetError, "not a subnet: expected a dict of 'gates' and one list of numbers per axis"):
            values = msgspec.convert(data, dict[str, list[int | float]])
            gates = values.pop("gates")
            if not set(gates) <= {0, 1}:
                raise errors.SubnetError(f"gates are 0 or 1, got {gates}")
            return Subnet(tuple(map(int, gates)), tuple((name, tuple(v)) for name, v in values.items()))


@errors.refusing(errors.SubnetError, "an envelope needs subnets of one search space")
def envelope_of(subnets: Iterable[Subnet]) -> Subnet:
    """The smallest subnet that covers all of `subnets`: union of gates, maximum of every axis.

    The result need not belong to the search space: a union of gates may have a depth that no stage allows.

    >>> envelope_of([Subnet((1, 0), (("w", (1.0,)),)), Subnet((0, 1), (("w", (0.5,)),))])
    Subnet(gates 11, w 1.0)
    """
    subnets = list(subnets)
    if not subnets:
        raise errors.SubnetError("the envelope of no subnets is not defined; pass at least one")
    gates = tuple(max(column) for column in zip(*(s.gates for s in subnets), strict=True))
    axes = tuple(
        (name, tuple(max(column) for column in zip(*(s[name] for s in subnets), strict=True))) for name, _ in subnets[0].axes
    )
    return Subnet(gates, axes)


def evenly_spaced(subnets: Iterable[Subnet], cost: Callable[[Subnet], float], count: int) -> list[Subnet]:
    """Choose `count` subnets from the cheapest to the most expensive, spaced as evenly in cost as possible.

    Returns all subnets if there are no more than `count`.

    >>> evenly_spaced([Subnet((i,)) for i in (0, 1, 4, 9, 10)], lambda s: s.gates[0], 3)
    [Subnet(gates 0), Subnet(gates 4), Subnet(gates 10)]
    """
    left = sorted(subnets, key=cost)
    if len(left) <= count:
        return left
    chosen = []
    for target in np.linspace(cost(left[0]), cost(left[-1]), count):
        chosen.append(min(left, key=lambda s: abs(cost(s) - target)))
        left.remove(chosen[-1])
    return sorted(chosen, key=cost)
