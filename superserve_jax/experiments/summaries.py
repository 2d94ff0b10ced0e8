"""What the rows of `evaluation` say: means over seeds, and gains over the fixed models as the paper reports them. No jax.

The fixed models of a profile are points (accuracy, attainment) on the same arrivals. A policy is compared with them
- **on the lines**: the straight lines that join them in the order of accuracy, as though there were a model anywhere on them;
- **strictly**: with one of the models itself, the next better one: at equal attainment the most accurate that attains no less,
  at equal accuracy the one of the highest attainment that is no less accurate.
"""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from superserve_jax import errors
from superserve_jax.experiments.runner import CellResult


class Point(NamedTuple):
    """A policy's figures on a trace: accuracy in percent, attainment as a fraction."""

    accuracy: float
    attainment: float


class Gain(NamedTuple):
    """A policy against the fixed models.

    Args:
      points_line, points: percentage points of accuracy at equal attainment, on the lines and strictly.
      times_line, times: attainment at equal accuracy, as a multiple; infinite where the models attain nothing.
    """

    points_line: float
    points: float
    times_line: float
    times: float


def gain(policy: Point, fixed: Iterable[Point]) -> Gain:
    """Against the fixed models, both ways.

    Where the policy attains more than any model, it is compared with the model that attains the most; where it is more
    accurate than any, with the most accurate. Raises ConfigError without models.

    >>> gain(Point(78.0, 0.875), [Point(74.0, 1.0), Point(76.0, 0.75), Point(80.0, 0.25)])
    Gain(points_line=3.0, points=4.0, times_line=1.75, times=3.5)
    """
    models = sorted(fixed)
    if not models:
        raise errors.ConfigError("there are no fixed models to compare with; run fixed:all, too")
    most = max(models, key=lambda m: (m.attainment, m.accuracy))
    attainment = min(policy.attainment, most.attainment)
    accuracy = min(policy.accuracy, models[-1].accuracy)
    on_lines = max(_reaching(a, b, attainment) for a, b in itertools.pairwise([models[0], *models]))
    strictly = max(m.accuracy for m in models if m.attainment >= attainment)
    return Gain(
        points_line=policy.accuracy - on_lines,
        points=policy.accuracy - strictly,
        times_line=_ratio(policy.attainment, _attained(models, accuracy)),
        times=_ratio(policy.attainment, max(m.attainment for m in models if m.accuracy >= accuracy)),
    )


def _reaching(a: Point, b: Point, attainment: float) -> float:
    """The highest accuracy on the line from `a` to the more accurate `b` that attains so much, or minus infinity."""
    if b.attainment >= attainment:
        return b.accuracy
    if a.attainment < attainment:
        return -math.inf
    return a.accuracy + (b.accuracy - a.accuracy) * (a.attainment - attainment) / (a.attainment - b.attainment)


def _attained(models: Sequence[Point], accuracy: float) -> float:
    """What the lines attain at an accuracy."""
    for a, b in itertools.pairwise(models):
        if a.accuracy < accuracy <= b.accuracy:
            return a.attainment + (b.attainment - a.attainment) * (accuracy - a.accuracy) / (b.accuracy - a.accuracy)
    return models[0].attainment


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.inf


@dataclasses.dataclass(frozen=True)
class Summary:
    """One policy on one trace: means over the seeds, `_sd` the standard deviation over them (0 for one seed).

    Args:
      accuracy: NaN where no query met its deadline.
      rows: what the means are of.
    """

    preset: str
    trace: str
    scale: float
    policy: str
    attainment: float
    attainment_sd: float
    accuracy: float
    accuracy_sd: float
    fluid_accuracy: float
    rows: tuple[CellResult, ...]

    def mean(self, key: str) -> float:
        """Mean of another value of the rows; NaN where they have none."""
        return _mean_sd([row[key] for row in self.rows])[0]

    @property
    def point(self) -> Point:
        """The means."""
        return Point(self.accuracy, self.attainment)


def summarize(rows: Iterable[CellResult]) -> list[Summary]:
    """The rows without their seeds, in the order of first appearance.

    >>> row = dict(preset="p", trace="t", scale=1.0, policy="q", accuracy=78.0, fluid_accuracy=79.0)
    >>> [s] = summarize([{**row, "seed": 0, "attainment": 1.0}, {**row, "seed": 1, "attainment": 0.5}])
    >>> s.attainment, round(s.attainment_sd, 3), s.accuracy_sd
    (0.75, 0.354, 0.0)
    """
    groups: dict[tuple, list[CellResult]] = collections.defaultdict(list)
    for row in rows:
        groups[row["preset"], row["trace"], row["scale"], row["policy"]].append(row)
    found = []
    for (preset, trace, scale, policy), group in groups.items():
        attainment, attainment_sd = _mean_sd(r["attainment"] for r in group)
        accuracy, accuracy_sd = _mean_sd(r["accuracy"] for r in group)
        fluid_accuracy, _ = _mean_sd(r["fluid_accuracy"] for r in group)
        figures = (attainment, attainment_sd, accuracy, accuracy_sd, fluid_accuracy)
        found.append(Summary(preset, trace, scale, policy, *figures, rows=tuple(group)))
    return found


def gains(summarize: Sequence[Summary], policy: str) -> dict[str, Gain]:
    """By trace, a policy's gain over the fixed models: read for each seed, on the same arrivals, then averaged.

    Args:
      summaries: of one preset and scale. Traces without fixed models are left out.
    """
    found = {}
    for mine in summarize:
        fixed = [s for s in summarize if s.trace == mine.trace and s.policy.startswith("fixed:")]
        if mine.policy != policy or not fixed:
            continue
        per_seed = []
        for row in mine.rows:
            rivals = [r for s in fixed for r in s.rows if r["seed"] == row["seed"] and r["accuracy"] is not None]
            if row["accuracy"] is not None and rivals:
                per_seed.append(gain(_point(row), map(_point, rivals)))
        if per_seed:
            found[mine.trace] = Gain(*(statistics.fmean(column) for column in zip(*per_seed, strict=True)))
    return found


def _point(row: CellResult) -> Point:
    return Point(row["accuracy"], row["attainment"])


def _mean_sd(values: Iterable[float | None]) -> tuple[float, float]:
    known = [v for v in values if v is not None]
    if not known:
        return math.nan, math.nan
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0
