"""Subnets and the search space they come from. No jax.

A subnet is the paper's control tuple (D, W): one gate per block, which LayerSelect reads, and one choice per position of
each named elastic axis, which WeightSlice reads. A family of SuperNets describes its freedom as a `SearchSpace`:

- **blocks** stand in stages; each stage has a list of allowed depths. A depth is shorthand for gates through a rule:
  `"first"` keeps the first d blocks (CNNs), `"every_other"` drops L - d evenly spaced blocks (transformers).
- **axes** (`width`, `expand`, ...) have one position per stage, per block or per layer. A position that belongs to a block
  counts only where the block is kept; elsewhere a subnet holds the smallest choice, so equal networks are equal subnets.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from superserve_jax import errors

DepthRule = Literal["first", "every_other"]

_MAX_BLOCKS = 1_000  # a config that was read from a file may ask for more than there is memory for


@dataclasses.dataclass(frozen=True)
class Subnet:
    """One network inside a SuperNet: gates per block, choices per axis. Hashable; made by `SearchSpace.subnet`.

    >>> a = Subnet((1, 0), (("width", (0.5,)),))
    >>> a["width"], a.covers(Subnet((0, 0), (("width", (0.5,)),)))
    ((0.5,), True)
    """

    gates: tuple[int, ...]
    axes: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self):
        # A subnet is a dictionary key on serving's hot path; hashing long tuples there would cost microseconds.
        try:
            object.__setattr__(self, "_hash", hash((self.gates, self.axes)))
        except TypeError as e:
            raise errors.SubnetError(f"gates and axes are tuples of tuples, got {self}; use SearchSpace.subnet ({e})") from e

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self):
        return Subnet, (self.gates, self.axes)  # string hashes differ between processes

    def __getitem__(self, axis: str) -> tuple[float, ...]:
        for name, values in self.axes:
            if name == axis:
                return values
        raise errors.unknown_name("axis", axis, [name for name, _ in self.axes])

    def computed_in(self, envelope_of: "Subnet") -> "Subnet":
        """What is computed of this subnet by a program for all that `envelope` covers: its own blocks, at the envelope's size.

        >>> Subnet((1, 0), (("width", (0.5,)),)).computed_in(Subnet((1, 1), (("width", (1.0,)),)))
        Subnet(gates=(1, 0), axes=(('width', (1.0,)),))
        """
        return Subnet(self.gates, envelope_of.axes)

    @errors.refusing(errors.SubnetError, "two subnets can be compared that are of one search space")
    def covers(self, other: "Subnet") -> bool:
        """Whether every block and every channel of `other` is also in this subnet."""
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
        """The inverse of `to_json`. Raises SubnetError where `data` has not that form."""
        with errors.refusing(errors.SubnetError, "not a subnet: expected a dict of 'gates' and one list per axis"):
            gates = tuple(data["gates"])
            if not set(gates) <= {0, 1}:
                raise errors.SubnetError(f"gates are 0 or 1, got {list(gates)}")
            axes = tuple((str(k), tuple(float(v) for v in data[k])) for k in data if k != "gates")
            return Subnet(tuple(int(g) for g in gates), axes)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A named elastic axis: for each position its choices, ascending.

    `blocks[i]` is the block that position i belongs to; None where positions do not belong to blocks.
    """

    name: str
    choices: tuple[tuple[float, ...], ...]
    blocks: tuple[int, ...] | None = None

    @errors.refusing(errors.ConfigError, "an axis needs a name, and a tuple of numbers at every position")
    def __post_init__(self):
        if not isinstance(self.name, str):
            raise errors.ConfigError(f"an axis needs a name, got {self.name!r}")
        if not self.choices or not all(self.choices):
            raise errors.ConfigError(f"axis '{self.name}' needs at least one choice at every position, got {self.choices}")
        for c in self.choices:
            if list(c) != sorted(set(c)) or not all(math.isfinite(v) for v in c):
                raise errors.ConfigError(f"axis '{self.name}': choices must be finite and ascending, got {c}")
        if self.blocks is not None and len(self.blocks) != len(self.choices):
            raise errors.ConfigError(
                f"axis '{self.name}' has {len(self.choices)} positions but names {len(self.blocks)} blocks"
            )


@errors.refusing(errors.SubnetError, "an envelope is of subnets of one search space")
def envelope_of(subnets: Iterable[Subnet]) -> Subnet:
    """The smallest subnet that covers all of `subnets`: union of gates, maximum of every axis.

    It need not belong to the search space (a union of named layers may have a depth that is not offered).

    >>> envelope_of([Subnet((1, 0), (("w", (1.0,)),)), Subnet((0, 1), (("w", (0.5,)),))])
    Subnet(gates=(1, 1), axes=(('w', (1.0,)),))
    """
    subnets = list(subnets)
    if not subnets:
        raise errors.SubnetError("the envelope of no subnets is not defined; pass at least one")
    gates = tuple(max(column) for column in zip(*(s.gates for s in subnets), strict=True))
    axes = tuple(
        (name, tuple(max(column) for column in zip(*(s[name] for s in subnets), strict=True))) for name, _ in subnets[0].axes
    )
    return Subnet(gates, axes)


def check_depths(depths: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError unless the depths of each stage can be. Families ask before they list what each block may choose."""
    for d in depths:
        if not all(isinstance(n, int) for n in d):
            raise errors.ConfigError(f"depths are whole numbers of blocks, got {d}")
        if not d or list(d) != sorted(set(d)) or d[0] < 0 or d[-1] < 1:
            raise errors.ConfigError(f"depths of a stage must be ascending, from 0, with a largest of 1 or more; got {d}")
    if (blocks := sum(d[-1] for d in depths)) > _MAX_BLOCKS:
        raise errors.ConfigError(f"a search space may have {_MAX_BLOCKS:,} blocks, got {blocks:,}")


def evenly_spaced(subnets: Iterable[Subnet], cost: Callable[[Subnet], float], count: int) -> list[Subnet]:
    """`count` of the subnets, from the cheapest to the dearest, as evenly spaced in cost as there are; all, if no more.

    >>> evenly_spaced([Subnet((i,)) for i in (0, 1, 4, 9, 10)], lambda s: s.gates[0], 3)
    [Subnet(gates=(0,), axes=()), Subnet(gates=(4,), axes=()), Subnet(gates=(10,), axes=())]
    """
    left = sorted(subnets, key=cost)
    if len(left) <= count:
        return left
    chosen = []
    for target in np.linspace(cost(left[0]), cost(left[-1]), count):
        chosen.append(min(left, key=lambda s: abs(cost(s) - target)))
        left.remove(chosen[-1])
    return sorted(chosen, key=cost)


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """All subnets of a SuperNet.

    Args:
      depths: for each stage its allowed numbers of kept blocks, ascending; the last is the number of blocks it has.
      axes: the other elastic axes.
      rule: how a depth becomes gates, `"first"` or `"every_other"`; with the latter a subnet may also name its kept blocks.

    >>> space = SearchSpace(((1, 2),), (Axis("width", ((0.5, 1.0),)),))
    >>> space.size, space.largest().gates, space.smallest()["width"]
    (4, (1, 1), (0.5,))
    """

    depths: tuple[tuple[int, ...], ...]
    axes: tuple[Axis, ...] = ()
    rule: DepthRule = "first"

    @errors.refusing(errors.ConfigError, "a search space needs tuples of whole depths, one per stage, and a tuple of `Axis`")
    def __post_init__(self):
        if self.rule not in ("first", "every_other"):
            raise errors.unknown_name("depth rule", self.rule, ["first", "every_other"])
        check_depths(self.depths)
        names = [a.name for a in self.axes]
        if len(set(names)) != len(names) or {"depth", "gates"} & set(names):
            raise errors.ConfigError(f"axis names must differ and not be 'depth' or 'gates', got {names}")
        for axis in self.axes:
            if axis.blocks is not None and not all(0 <= b < self.num_blocks for b in axis.blocks):
                raise errors.ConfigError(f"axis '{axis.name}' names a block outside 0..{self.num_blocks - 1}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the largest subnet."""
        return sum(d[-1] for d in self.depths)

    @property
    def stages(self) -> tuple[range, ...]:
        """The block indices of each stage."""
        ends = list(itertools.accumulate(d[-1] for d in self.depths))
        return tuple(range(end - d[-1], end) for end, d in zip(ends, self.depths, strict=True))

    # -- making subnets -------------------------------------------------------------------------------------------------

    @errors.refusing(errors.SubnetError, "a subnet is chosen by numbers: depth or gates, and choices of the axes")
    def subnet(self, *, depth: Any = None, gates: Sequence[int] | None = None, **axes: Any) -> Subnet:
        """A validated subnet of this space.

        A scalar stands for the same choice at every position; what is left out is the largest choice.

        Args:
          depth: kept blocks, one int or one per stage.
          gates: instead of depth, 0 or 1 per block.
          **axes: for each axis one choice, or one per position.

        Raises:
          SubnetError: a value is not among the choices. UnknownNameError: no such axis.
        """
        if gates is None:
            gates = self.gates(depth)
        elif depth is not None:
            raise errors.SubnetError("give depth or gates, not both")
        for name in axes:
            if name not in (a.name for a in self.axes):
                raise errors.unknown_name("axis", name, ["depth", "gates", *(a.name for a in self.axes)])
        values = tuple((a.name, _positions(a.name, axes.get(a.name), a.choices)) for a in self.axes)
        return self.validate(Subnet(tuple(gates), values))

    @errors.refusing(errors.SubnetError, "a depth is a whole number, or one per stage")
    def gates(self, depth: Any = None) -> tuple[int, ...]:
        """The gates that a depth (one int, or one per stage) is shorthand for."""
        depth = _positions("depth", depth, self.depths)
        result: list[int] = []
        for d, choices in zip(depth, self.depths, strict=True):
            blocks = choices[-1]
            if self.rule == "first":
                kept = set(range(int(d)))
            else:
                # DynaBERT's every-other rule: kept block i is floor(i * L / d), so exactly L - d are dropped.
                kept = {i * blocks // int(d) for i in range(int(d))}
            result += [int(i in kept) for i in range(blocks)]
        return tuple(result)

    @errors.refusing(errors.SubnetError, "not a subnet of gates and (axis, choices); use SearchSpace.subnet")
    def validate(self, subnet: Subnet) -> Subnet:
        """`subnet` in canonical form: choices of dropped blocks set to the smallest. Raises SubnetError with the reason."""
        if not isinstance(subnet, Subnet):
            raise errors.SubnetError(f"expected a Subnet, such as SearchSpace.subnet makes, got {subnet!r}")
        if len(subnet.gates) != self.num_blocks or not set(subnet.gates) <= {0, 1}:
            raise errors.SubnetError(f"gates must be {self.num_blocks} values of 0 or 1, got {list(subnet.gates)}")
        for m, (stage, choices) in enumerate(zip(self.stages, self.depths, strict=True)):
            kept = [subnet.gates[b] for b in stage]
            if sum(kept) not in choices:
                raise errors.SubnetError(f"stage {m} keeps {sum(kept)} blocks; its depths are {list(choices)}")
            if self.rule == "first" and kept != sorted(kept, reverse=True):
                raise errors.SubnetError(f"stage {m} must keep its first blocks, got gates {kept}")
        names = [name for name, _ in subnet.axes]
        if names != [a.name for a in self.axes]:
            raise errors.SubnetError(f"axes are {[a.name for a in self.axes]}, in this order; got {names}")
        axes = []
        for axis, (_, values) in zip(self.axes, subnet.axes, strict=True):
            if len(values) != len(axis.choices):
                raise errors.SubnetError(f"axis '{axis.name}' has {len(axis.choices)} positions, got {len(values)}")
            axes.append((axis.name, tuple(self._choice(axis, i, v, subnet.gates) for i, v in enumerate(values))))
        return Subnet(tuple(int(g) for g in subnet.gates), tuple(axes))

    @staticmethod
    def _choice(axis: Axis, position: int, value: float, gates: tuple[int, ...]) -> float:
        choices = axis.choices[position]
        if axis.blocks is not None and not gates[axis.blocks[position]]:
            return choices[0]
        for c in choices:
            if math.isclose(c, value, rel_tol=1e-6):
                return c
        raise errors.SubnetError(f"axis '{axis.name}', position {position}: {value} is not one of {list(choices)}")

    def smallest(self) -> Subnet:
        """The subnet with the smallest choice everywhere."""
        axes: dict[str, Any] = {a.name: [c[0] for c in a.choices] for a in self.axes}
        return self.subnet(depth=[d[0] for d in self.depths], **axes)

    def largest(self) -> Subnet:
        """The whole SuperNet."""
        return self.subnet()

    @errors.refusing(errors.SubnetError, "seed and step are whole numbers from 0 up, and 'below' a subnet of this space")
    def sample(self, seed: int, step: int, *, below: Subnet | None = None) -> Subnet:
        """A random subnet, a pure function of (seed, step): uniform over depths, then over choices.

        Args:
          below: an envelope; only subnets that it covers are drawn.
        """
        rng = np.random.default_rng([seed, step])
        found = self.vary(below or self.largest(), lambda choices, top: rng.choice([c for c in choices if c <= top]))
        if below is not None and not below.covers(found):
            raise errors.SubnetError("'below' keeps blocks that no depth of this space selects; sample from the whole space")
        return found

    def vary(self, subnet: Subnet, draw: Callable[[Sequence[Any], Any], Any]) -> Subnet:
        """A subnet with `draw(choices, choice of subnet)` for every depth, then at every position of every axis."""
        depth = [draw(c, sum(subnet.gates[b] for b in stage)) for c, stage in zip(self.depths, self.stages, strict=True)]
        axes = {a.name: [draw(c, now) for c, now in zip(a.choices, subnet[a.name], strict=True)] for a in self.axes}
        return self.subnet(depth=depth, **axes)

    @errors.refusing(errors.ConfigError, "elastic is a tuple of axes, choices a whole number")
    def narrowed(self, elastic: Sequence[str] | None = None, *, choices: int = 0) -> "SearchSpace":
        """The space with some freedom taken away; its subnets are, once validated here, subnets of this one.

        Args:
          elastic: axes that stay elastic, "depth" among them; the others keep their largest choice. All, where it is None.
          choices: at most so many of the largest choices of an axis stay; 0 leaves all.

        >>> SearchSpace(((1, 2, 3),)).narrowed(choices=2).depths, SearchSpace(((1, 2, 3),)).narrowed(()).size
        (((2, 3),), 1)
        """
        if choices < 0:
            raise errors.ConfigError(f"choices must be at least 0, which leaves all, got {choices}")
        known = ["depth", *(a.name for a in self.axes)]
        for name in elastic or ():
            if name not in known:
                raise errors.unknown_name("axis", name, known)

        def left(name: str, values: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
            count = 1 if elastic is not None and name not in elastic else choices
            return tuple(v[-count:] for v in values)

        axes = tuple(dataclasses.replace(a, choices=left(a.name, a.choices)) for a in self.axes)
        return dataclasses.replace(self, depths=left("depth", self.depths), axes=axes)

    def tied(self, subnet: Subnet) -> Subnet:
        """`subnet` with the choices of every kept block tied to the depth of its stage: the smallest where that is the
        smallest, the largest where it is the largest (CompOFA, Sahni et al., ICLR 2021). Axes that do not belong to blocks,
        and stages whose depth is not elastic, are left as they are."""
        subnet = self.validate(subnet)
        rank = {}
        for stage, depths in zip(self.stages, self.depths, strict=True):
            if len(depths) > 1:
                place = depths.index(sum(subnet.gates[b] for b in stage)) / (len(depths) - 1)
                rank.update(dict.fromkeys(stage, place))
        axes = []
        for axis, (name, values) in zip(self.axes, subnet.axes, strict=True):
            ranks = [rank.get(b) for b in axis.blocks] if axis.blocks is not None else [None] * len(values)
            places = zip(values, ranks, axis.choices, strict=True)
            axes.append((name, tuple(v if r is None else c[round(r * (len(c) - 1))] for v, r, c in places)))
        return self.validate(Subnet(subnet.gates, tuple(axes)))

    # -- counting and listing -------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of different subnets, counting depths through the rule."""
        total = math.prod(len(c) for a in self.axes if a.blocks is None for c in a.choices)
        start = 0
        for choices in self.depths:
            stage = range(start, start + choices[-1])
            start += choices[-1]
            total *= sum(self._block_choices(stage, d) for d in choices)
        return total

    def _block_choices(self, stage: range, depth: int) -> int:
        """Number of ways to choose the axes of the kept blocks of a stage."""
        if self.rule == "first":
            kept = set(stage[:depth])
        else:
            kept = {stage[i * len(stage) // depth] for i in range(depth)}
        return math.prod(
            len(c) for a in self.axes if a.blocks is not None for b, c in zip(a.blocks, a.choices, strict=True) if b in kept
        )

    def enumerate(self, limit: int = 100_000) -> Iterator[Subnet]:
        """Every subnet once. Raises SpaceTooLargeError where there are more than `limit`."""
        if self.size > limit:
            raise errors.SpaceTooLargeError(
                f"the space has {self.size:,} subnets, more than the limit of {limit:,}; sample it, or raise `limit`"
            )
        return self._enumerate()

    def _enumerate(self) -> Iterator[Subnet]:
        for depth in itertools.product(*self.depths):
            gates = self.gates(depth)
            options = [
                [c[:1] if a.blocks is not None and not gates[a.blocks[i]] else c for i, c in enumerate(a.choices)]
                for a in self.axes
            ]
            for values in itertools.product(*(itertools.product(*o) for o in options)):
                yield Subnet(gates, tuple((a.name, v) for a, v in zip(self.axes, values, strict=True)))


def _positions(name: str, value: Any, choices: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """One value per position: broadcasts a scalar, fills the largest where `value` is None."""
    if value is None:
        return tuple(c[-1] for c in choices)
    values = (value,) * len(choices) if np.ndim(value) == 0 else tuple(value)
    if len(values) != len(choices):
        raise errors.SubnetError(f"'{name}' needs {len(choices)} values (or one for all), got {len(values)}: {list(values)}")
    if name == "depth":
        for m, (v, c) in enumerate(zip(values, choices, strict=True)):
            if v not in c:
                raise errors.SubnetError(f"stage {m}: depth {v} is not one of {list(c)}")
        return tuple(int(v) for v in values)
    return tuple(float(v) for v in values)
