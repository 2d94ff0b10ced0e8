"""Which of the axes that can change are elastic, and which sizes they may have."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.tracing import patterns
from superserve_jax.tracing.found import ElasticAxis, Stage
from superserve_jax.tracing.kinds import KINDS

Choices = Sequence[float] | Sequence[int] | None
Follows = Mapping[str, tuple[str, Callable[[int], int]]]

AXES: dict[str, Choices] = {"heads": (0.25, 0.5, 0.75, 1.0), "expand": (0.25, 0.5, 0.75, 1.0)}
"""What is elastic by default, besides the depth and the sizes of kernels."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user asks for. `patterns.py` says what a pattern names.

    Args:
      axes: {a kind, or a pattern of axes' names: ratios (floats), sizes (ints), or None for not elastic}. A pattern wins over
        a kind, and a later entry over an earlier one. Kinds that are not named have the ratios of `AXES`, and kernels have
        all of their sizes. A pattern that names only axes of `follows` is refused.
      depth: {a pattern of stages' names: numbers of blocks to keep, or None for all of them}. Stages that are not named keep
        at least half of their blocks.
      rule: which blocks of a stage a smaller depth keeps: "first" or "every_other".
      divisor: sizes that come from ratios are multiples of it, except numbers of heads.
      method: the method by which the module calls its blocks.
      follows: {a pattern of axes' names: (the name of another axis, a function)}. The axes have no choice of their own. Their
        size is the function of the other axis's size. A "*" in the other name stands for what the pattern's "*" matched.
    """

    axes: Mapping[str, Choices] = dataclasses.field(default_factory=dict)
    depth: Mapping[str, Sequence[int] | None] = dataclasses.field(default_factory=dict)
    rule: str = "first"
    divisor: int = 1
    method: str = "__call__"
    follows: Follows = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        errors.check_name("rule", self.rule, ["first", "every_other"])
        if not isinstance(self.divisor, int) or self.divisor < 1:
            raise errors.ConfigError(f"divisor must be a whole number from 1 up, got {self.divisor!r}")
        for name in ("axes", "depth", "follows"):
            if not isinstance(getattr(self, name), Mapping):
                raise errors.ConfigError(f"{name} must be a dict, such as {_EXAMPLES[name]}; got {getattr(self, name)!r}")
        for pattern, choices in self.axes.items():
            _check_choices("axes", pattern, choices)
        for pattern, tie in self.follows.items():
            if not (isinstance(tie, Sequence) and len(tie) == 2 and isinstance(tie[0], str) and callable(tie[1])):
                raise errors.ConfigError(f"follows must be a dict such as {_EXAMPLES['follows']}; got {tie!r} for {pattern!r}")
        for pattern, choices in self.depth.items():
            _check_choices("depth", pattern, choices)
            if choices is not None and not all(isinstance(n, int) for n in choices):
                raise errors.ConfigError(f"depth {pattern!r} must be numbers of blocks, such as (2, 4); got {choices!r}")

    def check_patterns(self, axes: Sequence[ElasticAxis], stages: Sequence[Stage]) -> None:
        """Raises UnknownNameError for a pattern that names nothing."""
        for pattern in self.follows:
            if all(patterns.match(pattern, axis.name) is None for axis in axes):
                raise errors.unknown_name("axis", pattern, [axis.name for axis in axes])
        for pattern in self.axes:
            named = [axis.name for axis in axes if axis.matches(pattern)]
            if pattern not in KINDS and not named:
                raise errors.unknown_name("axis", pattern, [*KINDS, *(axis.name for axis in axes)])
            if pattern not in KINDS and all(map(self._tie, named)):
                raise errors.ConfigError(
                    f"axes {pattern!r} names only axes that follow others, such as '{named[0]}', so it has no effect; leave "
                    "it out, or the axes out of `follows`"
                )
        for pattern in self.depth:
            if not any(stage.matches(pattern) for stage in stages):
                raise errors.unknown_name("stage of blocks", pattern, [stage.name for stage in stages])

    def sized(self, axes: Sequence[ElasticAxis]) -> list[ElasticAxis]:
        """The axes with their sizes."""
        own = {axis.name: dataclasses.replace(axis, sizes=self.sizes(axis)) for axis in axes}
        return [self._following(axis, own) or axis for axis in own.values()]

    def _following(self, axis: ElasticAxis, own: Mapping[str, ElasticAxis]) -> ElasticAxis | None:
        """An axis with the sizes that follow another one. None if it has a choice of its own."""
        if (tie := self._tie(axis.name)) is None:
            return None
        other, function = tie
        errors.check_name("axis", other, own)
        if self._tie(other):
            raise errors.ConfigError(f"axis '{axis.name}' follows '{other}', which follows another one; name that one")
        sizes = tuple(function(size) for size in own[other].sizes)
        is_possible = all(_is_size(n) and n in (axis.steps or [n]) for n in sizes)
        if list(sizes) != sorted(sizes) or sizes[-1] != axis.size or not is_possible:
            wanted = f"some of {axis.steps}" if axis.steps else f"whole numbers from 1 to {axis.size}"
            raise errors.ConfigError(
                f"axis '{axis.name}' of {axis.size} entries would have the sizes {sizes} where '{other}' has "
                f"{own[other].sizes}; expected {wanted}, ascending, the last {axis.size}"
            )
        return dataclasses.replace(axis, sizes=sizes, leader=other)

    def _tie(self, name: str) -> tuple[str, Callable[[int], int]] | None:
        """The axis that an axis follows, and the function of its size. None if it follows none."""
        for pattern, (other, function) in self.follows.items():
            if (texts := patterns.match(pattern, name)) is not None:
                for text in texts:
                    other = other.replace("*", text, 1)
                return other, function
        return None

    def sizes(self, axis: ElasticAxis) -> tuple[int, ...]:
        """The sizes of an axis, ascending. The last one is that of the whole network."""
        choices: Choices = {"kernel": axis.steps, **AXES, **self.axes}.get(axis.kind)
        for pattern, wanted in self.axes.items():
            if pattern not in KINDS and axis.matches(pattern):
                choices = wanted
        if choices is None:
            return (axis.size,)
        step = 1 if axis.kind == "heads" else self.divisor
        sizes = {_size(choice, axis, step) for choice in choices}
        return tuple(sorted({*sizes, axis.size}))

    def depths(self, stage: Stage) -> tuple[int, ...]:
        """The depths of a stage, ascending. The last one is that of the whole network."""
        count = len(stage.blocks)
        choices: Sequence[int] | None = range(math.ceil(count / 2), count + 1)
        for pattern, wanted in self.depth.items():
            if stage.matches(pattern):
                choices = wanted
        if choices is None:
            return (count,)
        if odd := [n for n in choices if not 0 <= n <= count]:
            raise errors.ConfigError(f"stage '{stage.name}' has {count} blocks, so it cannot keep {odd[0]}")
        return tuple(sorted({*choices, count}))


_EXAMPLES = {
    "follows": '{"blocks.*.squeeze": ("blocks.*.expand", lambda n: n // 4)}',
    "axes": '{"heads": None, "expand": (0.25, 0.5, 1.0)}',
    "depth": '{"blocks": (6, 9, 12)}',
}


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1


def _check_choices(what: str, pattern: Any, choices: Any) -> None:
    is_numbers = isinstance(choices, Sequence) and all(
        isinstance(c, int | float) and not isinstance(c, bool) and math.isfinite(c) for c in choices
    )
    if choices is not None and (isinstance(choices, str) or not is_numbers or not choices):
        raise errors.ConfigError(f"{what} must be a dict such as {_EXAMPLES[what]}; got {choices!r} for {pattern!r}")


def _size(choice: float, axis: ElasticAxis, step: int) -> int:
    if axis.steps and choice not in axis.steps:
        raise errors.ConfigError(f"kernel '{axis.name}' has the sizes {axis.steps}, so it cannot have {choice!r}")
    if isinstance(choice, int):
        if not 1 <= choice <= axis.size:
            raise errors.ConfigError(
                f"axis '{axis.name}' has {axis.size} entries, so it cannot have {choice}. A ratio has a point, such as 1.0"
            )
        return choice
    if not 0 < choice <= 1:
        raise errors.ConfigError(f"the ratio {choice} of axis '{axis.name}' must be above 0 and at most 1")
    return min(axis.size, max(step, round(choice * axis.size / step) * step))
