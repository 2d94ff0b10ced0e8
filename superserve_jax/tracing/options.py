"""Which of the axes that can change are elastic, and which sizes they may have."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.tracing.found import ElasticAxis, Stage
from superserve_jax.tracing.kinds import KINDS

Choices = Sequence[float] | Sequence[int] | None

AXES: dict[str, Choices] = {"heads": (0.25, 0.5, 0.75, 1.0), "expand": (0.25, 0.5, 0.75, 1.0)}
"""What is elastic by default, besides the depth and the sizes of kernels."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user asks for.

    Args:
      axes: {a kind, or a pattern of axes' names: ratios (floats), sizes (ints), or None for not elastic}. A pattern wins over
        a kind, and a later entry over an earlier one. Kinds that are not named have the ratios of `AXES`, and kernels have
        all of their sizes.
      depth: {a pattern of stages' names: numbers of blocks to keep, or None for all of them}. Stages that are not named keep
        at least half of their blocks.
      rule: which blocks of a stage a smaller depth keeps: "first" or "every_other".
      divisor: sizes that come from ratios are multiples of it, except numbers of heads.
      method: the method by which the module calls its blocks.
    """

    axes: Mapping[str, Choices] = dataclasses.field(default_factory=dict)
    depth: Mapping[str, Sequence[int] | None] = dataclasses.field(default_factory=dict)
    rule: str = "first"
    divisor: int = 1
    method: str = "__call__"

    def __post_init__(self):
        errors.check_name("rule", self.rule, ["first", "every_other"])
        if not isinstance(self.divisor, int) or self.divisor < 1:
            raise errors.ConfigError(f"divisor must be a whole number from 1 up, got {self.divisor!r}")
        for name in ("axes", "depth"):
            if not isinstance(getattr(self, name), Mapping):
                raise errors.ConfigError(f"{name} must be a dict, such as {_EXAMPLES[name]}; got {getattr(self, name)!r}")
        for pattern, choices in self.axes.items():
            _check_choices("axes", pattern, choices)
        for pattern, choices in self.depth.items():
            _check_choices("depth", pattern, choices)
            if choices is not None and not all(isinstance(n, int) for n in choices):
                raise errors.ConfigError(f"depth {pattern!r} must be numbers of blocks, such as (2, 4); got {choices!r}")

    def check_patterns(self, axes: Sequence[ElasticAxis], stages: Sequence[Stage]) -> None:
        """Raises UnknownNameError for a pattern that names nothing."""
        for pattern in self.axes:
            if pattern not in KINDS and not any(axis.matches(pattern) for axis in axes):
                raise errors.unknown_name("axis", pattern, [*KINDS, *(axis.name for axis in axes)])
        for pattern in self.depth:
            if not any(_matches(stage, pattern) for stage in stages):
                raise errors.unknown_name("stage of blocks", pattern, [stage.name for stage in stages])

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
            if _matches(stage, pattern):
                choices = wanted
        if choices is None:
            return (count,)
        if odd := [n for n in choices if not 0 <= n <= count]:
            raise errors.ConfigError(f"stage '{stage.name}' has {count} blocks, so it cannot keep {odd[0]}")
        return tuple(sorted({*choices, count}))


_EXAMPLES = {"axes": '{"heads": None, "expand": (0.25, 0.5, 1.0)}', "depth": '{"blocks": (6, 9, 12)}'}


def _matches(stage: Stage, pattern: str) -> bool:
    return pattern in ("*", stage.name) or stage.name.partition("[")[0] == pattern


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
