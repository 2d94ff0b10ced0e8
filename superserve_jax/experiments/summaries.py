"""Summaries of results: means over the seeds, and gains over the fixed models as the paper reports them. No jax.

A fixed model always runs the same subnet. On given arrivals it is a point (accuracy, attainment). A policy's gain over the
fixed models is computed in two ways:
- On the lines: straight lines join the models in the order of accuracy. Every point on them counts as a model.
- Strictly: the policy is compared with one model. At equal attainment this is the most accurate model that attains at least as
  much. At equal accuracy it is the model with the highest attainment that is at least as accurate.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from superserve_jax import errors
from superserve_jax.experiments.runner import CellResult

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Point(NamedTuple):
    """A policy on a trace: accuracy in percent, attainment as a fraction."""

    accuracy: float
    attainment: float


class Gain(NamedTuple):
    """A policy compared with the fixed models.

    Args:
      points_line: percentage points of accuracy at equal attainment, on the lines.
      points: the same, strictly.
      times_line: attainment at equal accuracy, as a multiple, on the lines. It is infinite if the models attain nothing.
      times: the same, strictly.
    """

    points_line: float
    points: float
    times_line: float
    times: float


def gain(policy: Point, fixed: Iterable[Point]) -> Gain:
    """The gain of a policy over the fixed models.

    A policy that attains more than every model is compared with the model that attains the most. One that is more accurate
    than every model is compared with the most accurate model. Raises ConfigError without models.

    >>> gain(Point(78.0, 0.875), [Point(74.0, 1.0), Point(76.0, 0.75), Point(80.0, 0.25)])
    Gain(points_line=3.0, points=4.0, times_line=1.75, times=3.5)
    """
    models = sorted(fixed)
    if not models:
        raise errors.ConfigError("there are no fixed models to compare with; add the policy fixed:all")
    attainment = min(policy.attainment, max(m.attainment for m in models))
    accuracy = min(policy.accuracy, models[-1].accuracy)
    on_lines = max(_accuracy_on_line(a, b, attainment) for a, b in itertools.pairwise([models[0], *models]))
    accuracies, attainments = zip(*models, strict=True)
    strictly = max(m.accuracy for m in models if m.attainment >= attainment)
    return Gain(
        points_line=policy.accuracy - on_lines,
        points=policy.accuracy - strictly,
        times_line=_ratio(policy.attainment, float(np.interp(accuracy, accuracies, attainments))),
        times=_ratio(policy.attainment, max(m.attainment for m in models if m.accuracy >= accuracy)),
    )


def _accuracy_on_line(a: Point, b: Point, attainment: float) -> float:
    """The highest accuracy on the line from `a` to the more accurate `b` that has this attainment, or minus infinity."""
    if b.attainment >= attainment:
        return b.accuracy
    if a.attainment < attainment:
        return -math.inf
    return a.accuracy + (b.accuracy - a.accuracy) * (a.attainment - attainment) / (a.attainment - b.attainment)


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.inf


@dataclasses.dataclass(frozen=True)
class Summary:
    """One policy on one trace, over all seeds."""

    preset: str
    trace: str
    scale: float
    policy: str
    results: tuple[CellResult, ...]

    def mean(self, key: str) -> float:
        """The mean of a value over the seeds; NaN if no result has it."""
        known = self._known(key)
        return statistics.fmean(known) if known else math.nan

    def sd(self, key: str) -> float:
        """The standard deviation of a value over the seeds; 0 for one seed, NaN if no result has it."""
        known = self._known(key)
        return statistics.stdev(known) if len(known) > 1 else 0.0 if known else math.nan

    @property
    def attainment(self) -> float:
        """Mean SLO attainment, a fraction."""
        return self.mean("attainment")

    @property
    def accuracy(self) -> float:
        """Mean serving accuracy in percent; NaN if no query met its deadline."""
        return self.mean("accuracy")

    @property
    def below_bound(self) -> float:
        """Percentage points of accuracy below the fluid bound."""
        return self.mean("fluid_accuracy") - self.accuracy

    @property
    def fixed(self) -> bool:
        """Whether the policy is a fixed model."""
        return self.policy.startswith("fixed:")

    def _known(self, key: str) -> list[float]:
        return [result[key] for result in self.results if result[key] is not None]


def summarize(results: Iterable[CellResult]) -> list[Summary]:
    """Summaries over the seeds, in the order of first appearance.

    >>> result = dict(preset="p", trace="t", scale=1.0, policy="q", accuracy=78.0)
    >>> [s] = summarize([{**result, "seed": 0, "attainment": 1.0}, {**result, "seed": 1, "attainment": 0.5}])
    >>> s.attainment, round(s.sd("attainment"), 3), s.sd("accuracy")
    (0.75, 0.354, 0.0)
    """
    groups = grouped(results, lambda r: (r["preset"], r["trace"], r["scale"], r["policy"]))
    return [Summary(*names, tuple(group)) for names, group in groups.items()]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, in the order of first appearance.

    >>> grouped(["apple", "bean", "avocado"], lambda word: word[0])
    {'a': ['apple', 'avocado'], 'b': ['bean']}
    """
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def gains(summaries: Sequence[Summary], policy: str) -> dict[str, Gain]:
    """A policy's gain over the fixed models, by trace. It compares runs on the same arrivals and is averaged over the seeds.

    Args:
      summaries: the summaries of one preset at one scale. Traces without fixed models are left out.
      policy: the policy's name.
    """
    found = {}
    for trace, group in grouped(summaries, lambda s: s.trace).items():
        known = [r for s in group for r in s.results if r["accuracy"] is not None and (s.fixed or s.policy == policy)]
        per_seed = []
        for of_seed in grouped(known, lambda r: r["seed"]).values():
            fixed = [_point(r) for r in of_seed if r["policy"].startswith("fixed:")]
            per_seed += [gain(_point(r), fixed) for r in of_seed if r["policy"] == policy and fixed]
        if per_seed:
            found[trace] = Gain(*(statistics.fmean(values) for values in zip(*per_seed, strict=True)))
    return found


def _point(result: dict[str, Any]) -> Point:
    return Point(result["accuracy"], result["attainment"])
