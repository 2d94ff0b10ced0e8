"""Which fixed models keep up with the traffic of a replay, and one sentence that says what the replay's table means. No jax.

A fixed model keeps up if its SLO attainment is at least that of the adaptive policy minus 0.001. The comparison is with the
most accurate fixed model that keeps up: an operator who knows the profiled accuracies would choose it. Its gain is measured on
the examples of the replay, which nobody knew when choosing.

Only three rows decide this: the policy, the best fixed model that keeps up, and the next more accurate one. Less accurate ones
would not be chosen. More accurate ones are slower than one that fails. So a disturbance of other rows does no harm.
"""

import dataclasses
import math
from collections.abc import Sequence

LEEWAY = 0.001
"""A fixed model keeps up if it attains at most this much less than the adaptive policy."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One row of the table of a replay.

    Args:
      name: the policy's name, such as "fixed:4".
      label: its name in a sentence, such as "slackfit (default)".
      attainment: SLO attainment, a fraction.
      profiled: mean profiled accuracy of the queries that met their deadline, in percent; NaN if none did.
      measured: accuracy of their answers, in percent; NaN if none did.
      disturbance: what disturbed the machine meanwhile, in words; empty if nothing did.
    """

    name: str
    label: str
    attainment: float
    profiled: float
    measured: float
    disturbance: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An adaptive policy beside the fixed models.

    Args:
      policy: the adaptive policy.
      best: the most accurate fixed model that keeps up; None if none does.
      failing: the least accurate one of the fixed models that fail and are more accurate than `best`, or that met no
        deadline; None if there is none. Without `best`, the fixed model that met the most deadlines.
    """

    policy: Outcome
    best: Outcome | None
    failing: Outcome | None

    @property
    def disturbed(self) -> tuple[str, ...]:
        """The names of those of the three rows that a disturbance of the machine may have changed."""
        return tuple(row.name for row in self._rows if row.disturbance)

    @property
    def gain(self) -> float:
        """Measured accuracy of the policy minus that of `best`, in points; NaN without `best`."""
        return self.policy.measured - self.best.measured if self.best else math.nan

    @property
    def names(self) -> list[str]:
        """The names of the two or three policies."""
        return [row.name for row in self._rows]

    @property
    def _rows(self) -> list[Outcome]:
        return [row for row in (self.policy, self.best, self.failing) if row]

    def __str__(self) -> str:
        names = ", ".join(self.disturbed)
        doubt = f" The machine was disturbed during {names}, so this comparison does not count." if names else ""
        return self._result() + doubt

    def _result(self) -> str:
        policy, best, failing = self.policy, self.best, self.failing
        if not policy.attainment > 0:
            return f"{policy.label} met no deadline: this machine cannot serve this traffic."
        start = f"{policy.label} met {_percent(policy.attainment)} at {policy.measured:.1f} % accuracy"
        if best is None:
            missed = f"; the closest one, {failing.label}, missed {_percent(1 - failing.attainment)}" if failing else ""
            return f"{start}. No fixed model met as many deadlines{missed}."
        points = f"{abs(self.gain):.1f} points {'more' if self.gain >= 0 else 'less'}"
        start = f"{start}: {points} than {best.label}, the most accurate fixed model that keeps up"
        if failing is None:
            most = f"{best.label} is the most accurate one replayed, so there is little to gain"
            return f"{start}. {most}: raise --burst, or --speed with --trace."
        if math.isnan(failing.profiled):
            return f"{start}; {failing.label} met no deadline."
        return f"{start}; {failing.label} is more accurate and missed {_percent(1 - failing.attainment)}."


def compare_with_fixed(rows: Sequence[Outcome]) -> Verdict | None:
    """The verdict on the default policy, or on the first other one if that is not among the rows.

    None without an adaptive policy or without fixed models.

    >>> rows = [Outcome("slackfit", "SlackFit", 0.9999, 92.0, 92.1)]
    >>> rows += [Outcome(f"fixed:{i}", f"fixed:{i}", *row) for i, row in enumerate([(1.0, 90.0, 90.1), (0.7, 94.0, 94.2)])]
    >>> for clause in str(compare_with_fixed(rows)).split("; "):
    ...     print(clause)
    SlackFit met 99.99 % at 92.1 % accuracy: 2.0 points more than fixed:0, the most accurate fixed model that keeps up
    fixed:1 is more accurate and missed 30.00 %.
    """
    fixed = [row for row in rows if row.name.startswith("fixed:")]
    adaptive = sorted((row for row in rows if row not in fixed), key=lambda row: row.name != "slackfit")
    if not fixed or not adaptive:
        return None
    policy = adaptive[0]
    # A model that met no deadline has no accuracy. It fails, and comes last.
    by_accuracy = sorted(fixed, key=_profiled)
    keeping_up = [row for row in by_accuracy if row.attainment > 0 and row.attainment >= policy.attainment - LEEWAY]
    best = keeping_up[-1] if keeping_up else None
    if best is None:
        return Verdict(policy, None, max(fixed, key=lambda row: row.attainment))
    above = [row for row in by_accuracy if _profiled(row) > _profiled(best)]
    return Verdict(policy, best, above[0] if above else None)


def _profiled(row: Outcome) -> float:
    return math.inf if math.isnan(row.profiled) else row.profiled


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
