"""Search spaces: which subnets a SuperNet has. No jax.

This is one file because a subnet is only defined by the rules of its search space.

A family of SuperNets describes its subnets with a `SearchSpace` of blocks and axes:

- **blocks** form stages, and each stage has a list of allowed depths. A rule turns a depth into gates: `"first"` keeps the
  first d blocks (CNNs), `"every_other"` drops L - d evenly spaced blocks of L (transformers).
- **axes** (`width`, `expand`, ...) have one position per stage, per block or per layer. At a position of a
  dropped block, a subnet always has the smallest choice, so that equal networks are equal subnets.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet

DepthRule = Literal["first", "every_other"]

_MAX_BLOCKS = 1_000  # a config in a file may ask for more blocks than there is memory for


@dataclasses.dataclass(frozen=True)
class Axis:
    """A named elastic axis.

    Args:
      name: the axis's name.
      choices: the choices of each position, ascending. If they are ints, subnets hold ints.
      blocks: index of the block that each position belongs to; None if positions do not belong to blocks.
    """

    name: str
    choices: tuple[tuple[float, ...], ...]
    blocks: tuple[int, ...] | None = None

    @errors.refusing(errors.ConfigError, "an axis needs a name, and a tuple of numbers for every position")
    def __post_init__(self):
        if not isinstance(self.name, str):
            raise errors.ConfigError(f"an axis needs a name, got {self.name!r}")
        if not self.choices or not all(self.choices):
            raise errors.ConfigError(f"axis '{self.name}' needs at least one choice for every position, got {self.choices}")
        for c in self.choices:
            if list(c) != sorted(set(c)) or not all(math.isfinite(v) for v in c):
                raise errors.ConfigError(f"axis '{self.name}': choices must be finite and ascending, got {c}")
        if self.blocks is not None and len(self.blocks) != len(self.choices):
            raise errors.ConfigError(
                f"axis '{self.name}' has {len(self.choices)} positions but names {len(self.blocks)} blocks"
            )


def check_depths(depths: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError for impossible depths. Call it before you list the choices of each block: there may be too many."""
    for d in depths:
        if not all(isinstance(n, int) for n in d):
            raise errors.ConfigError(f"depths are whole numbers of blocks, got {d}")
        if not d or list(d) != sorted(set(d)) or d[0] < 0 or d[-1] < 1:
            raise errors.ConfigError(f"depths of a stage must be ascending and not negative, the largest at least 1; got {d}")
    if (blocks := sum(d[-1] for d in depths)) > _MAX_BLOCKS:
        raise errors.ConfigError(f"a search space may have at most {_MAX_BLOCKS:,} blocks, got {blocks:,}")


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """All subnets of a SuperNet.

    Args:
      depths: for each stage, the allowed numbers of kept blocks, ascending. The last one is the number of blocks of the stage.
      axes: the other elastic axes.
      rule: how a depth becomes gates, `"first"` or `"every_other"`. With `"every_other"`, a subnet may also have other gates.

    >>> space = SearchSpace(((1, 2),), (Axis("width", ((0.5, 1.0),)),))
    >>> space.size, space.largest().gates, space.smallest()["width"]
    (4, (1, 1), (0.5,))
    """

    depths: tuple[tuple[int, ...], ...]
    axes: tuple[Axis, ...] = ()
    rule: DepthRule = "first"

    @errors.refusing(errors.ConfigError, "a search space needs a tuple of ints per stage as depths, and a tuple of `Axis`")
    def __post_init__(self):
        errors.check_name("depth rule", self.rule, ["first", "every_other"])
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

    @errors.refusing(errors.SubnetError, "give numbers: depth or gates, and choices of the axes")
    def subnet(self, *, depth: Any = None, gates: Sequence[int] | None = None, **axes: Any) -> Subnet:
        """A validated subnet of this space.

        One number means the same choice at every position. A missing axis or depth gets its largest choices.

        Args:
          depth: the number of kept blocks, one int or one per stage.
          gates: 0 or 1 per block, instead of depth.
          **axes: for each axis one choice, or one per position.

        Raises:
          SubnetError: a value is not among the choices.
          UnknownNameError: the space has no axis of this name.
        """
        if gates is None:
            gates = self.gates(depth)
        elif depth is not None:
            raise errors.SubnetError("give depth or gates, not both")
        for name in axes:
            errors.check_name("axis", name, ["depth", "gates", *(a.name for a in self.axes)])
        values = tuple((a.name, _positions(a.name, axes.get(a.name), a.choices)) for a in self.axes)
        return self.validate(Subnet(tuple(gates), values))

    @errors.refusing(errors.SubnetError, "a depth is a whole number, or one per stage")
    def gates(self, depth: Any = None) -> tuple[int, ...]:
        """The gates of a depth, which is one int, or one per stage."""
        depth = _positions("depth", depth, self.depths)
        stages = [(choices[-1], self._kept(int(d), choices[-1])) for d, choices in zip(depth, self.depths, strict=True)]
        return tuple(int(i in kept) for blocks, kept in stages for i in range(blocks))

    def _kept(self, depth: int, blocks: int) -> set[int]:
        """Which blocks a depth keeps, of the blocks 0, 1, ... of a stage."""
        if self.rule == "first":
            return set(range(depth))
        # DynaBERT's every-other rule: kept block i is floor(i * L / d), so exactly L - d are dropped.
        return {i * blocks // depth for i in range(depth)}

    @errors.refusing(errors.SubnetError, "not a subnet with gates and (axis, choices) pairs; use SearchSpace.subnet")
    def validate(self, subnet: Subnet) -> Subnet:
        """The canonical form of a subnet: dropped blocks have their smallest choices. Raises SubnetError with the reason."""
        if not isinstance(subnet, Subnet):
            raise errors.SubnetError(f"expected a Subnet, as from SearchSpace.subnet, got {subnet!r}")
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

    def check_envelope(self, envelope: Subnet) -> None:
        """Raises SubnetError unless the envelope has blocks and choices of this space. Its depths may be of no subnet."""
        names = [name for name, _ in envelope.axes]
        if names != [a.name for a in self.axes] or not self.largest().covers(envelope):
            raise errors.SubnetError(f"{envelope.to_json()} is larger than the network")
        for axis, (name, values) in zip(self.axes, envelope.axes, strict=True):
            if odd := [value for value, choices in zip(values, axis.choices, strict=True) if value not in choices]:
                raise errors.SubnetError(f"axis '{name}' has no choice {odd[0]}")

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
        return self.vary(self.largest(), lambda choices, _: choices[0])

    def largest(self) -> Subnet:
        """The whole SuperNet."""
        return self.subnet()

    @errors.refusing(errors.SubnetError, "seed and step must be whole numbers from 0 up, and 'below' a subnet of this space")
    def sample(self, seed: int, step: int, *, below: Subnet | None = None) -> Subnet:
        """A random subnet, as a pure function of (seed, step). Each depth and each choice is drawn uniformly.

        Args:
          seed, step: whole numbers from 0 up.
          below: an envelope. Only subnets that it covers are drawn. None allows all subnets.
        """
        rng = np.random.default_rng([seed, step])
        found = self.vary(below or self.largest(), lambda choices, top: rng.choice([c for c in choices if c <= top]))
        if below is not None and not below.covers(found):
            raise errors.SubnetError("'below' has gates that no depth of this space gives; sample from the whole space")
        return found

    def vary(self, subnet: Subnet, draw: Callable[[Sequence[Any], Any], Any]) -> Subnet:
        """Replace every depth and choice of a subnet by `draw(choices, present choice)`. Depths are drawn first."""
        depth = [draw(c, sum(subnet.gates[b] for b in stage)) for c, stage in zip(self.depths, self.stages, strict=True)]
        axes = {a.name: [draw(c, now) for c, now in zip(a.choices, subnet[a.name], strict=True)] for a in self.axes}
        return self.subnet(depth=depth, **axes)

    @errors.refusing(errors.ConfigError, "elastic must be a tuple of names of axes, choices a whole number")
    def narrowed(self, elastic: Sequence[str] | None = None, *, choices: int = 0) -> "SearchSpace":
        """A smaller search space with fewer choices. After this space's `validate`, its subnets are subnets of this space.

        Args:
          elastic: names of the axes that stay elastic; "depth" counts as an axis. Other axes keep only their largest choice.
            None means that all stay elastic.
          choices: how many of its largest choices each elastic axis keeps; 0 keeps all.

        >>> SearchSpace(((1, 2, 3),)).narrowed(choices=2).depths, SearchSpace(((1, 2, 3),)).narrowed(()).size
        (((2, 3),), 1)
        """
        if choices < 0:
            raise errors.ConfigError(f"choices must be 0, which keeps all, or more, got {choices}")
        known = ["depth", *(a.name for a in self.axes)]
        for name in elastic or ():
            errors.check_name("axis", name, known)

        def left(name: str, values: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
            count = 1 if elastic is not None and name not in elastic else choices
            return tuple(v[-count:] for v in values)

        axes = tuple(dataclasses.replace(a, choices=left(a.name, a.choices)) for a in self.axes)
        return dataclasses.replace(self, depths=left("depth", self.depths), axes=axes)

    def tied(self, subnet: Subnet) -> Subnet:
        """`subnet` with the choices of every kept block tied to the depth of its stage (CompOFA, Sahni et al., ICLR 2021).

        A stage at its smallest depth gets the smallest choices, and a stage at its largest depth the largest. Depths between
        get choices in proportion. Axes that do not belong to blocks, and stages with one depth, do not change."""
        subnet = self.validate(subnet)
        rank = {}
        for stage, depths in zip(self.stages, self.depths, strict=True):
            if len(depths) > 1:
                place = depths.index(sum(subnet.gates[b] for b in stage)) / (len(depths) - 1)
                rank.update(dict.fromkeys(stage, place))
        axes = []
        for axis, (name, values) in zip(self.axes, subnet.axes, strict=True):
            places = zip(values, axis.blocks or [None] * len(values), axis.choices, strict=True)
            axes.append((name, tuple(c[round(rank[b] * (len(c) - 1))] if b in rank else v for v, b, c in places)))
        return self.validate(Subnet(subnet.gates, tuple(axes)))

    # -- counting and listing -------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of different subnets. Each depth counts once, with the gates that the rule gives it."""
        total = math.prod(len(c) for a in self.axes if a.blocks is None for c in a.choices)
        for stage, depths in zip(self.stages, self.depths, strict=True):
            total *= sum(self._block_choices({stage[i] for i in self._kept(d, len(stage))}) for d in depths)
        return total

    def _block_choices(self, kept: set[int]) -> int:
        """Number of choices for the axes of the kept blocks."""
        return math.prod(
            len(c) for a in self.axes if a.blocks is not None for b, c in zip(a.blocks, a.choices, strict=True) if b in kept
        )

    def enumerate(self, limit: int = 100_000) -> Iterator[Subnet]:
        """Iterate over every subnet once. Raises SpaceTooLargeError if there are more than `limit`."""
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
    """One value per position. A single number is repeated for all positions. None becomes the largest choices."""
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
