"""The paper's figures, or the goal where it has none, beside what the rows of `evaluation` say. No jax."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from superserve_jax.experiments import presets, runner
from superserve_jax.experiments.runner import CellResult
from superserve_jax.experiments.summaries import Summary, gains, summarize

DEFAULT, PAPER = "slackfit", "slackfit-paper"


class Finding(NamedTuple):
    """One line of the comparison.

    Args:
      reference: the paper's figure, or "goal: ..." where the figure is this project's own.
      ours: of the default policy unless `what` names another; of several cells the lowest and the highest.
    """

    preset: str
    scale: float
    what: str
    reference: str
    ours: str


class _Table:
    """The summaries of one preset at one scale, by trace and policy, in the order of the rows."""

    def __init__(self, summaries: list[Summary]):
        self.all = summaries
        self._by_key = {(s.trace, s.policy): s for s in summaries}
        self.traces = list(dict.fromkeys(s.trace for s in summaries))

    def get(self, trace: str, policy: str) -> Summary | None:
        """None where it was not run; "least-accurate" and the first fixed model are the same policy."""
        found = self._by_key.get((trace, policy))
        return self._by_key.get((trace, "fixed:0")) if found is None and policy == "least-accurate" else found

    def of(self, policy: str) -> list[Summary]:
        """A policy's summary on each trace."""
        return [s for s in (self.get(trace, policy) for trace in self.traces) if s is not None]

    def pairs(self, policy: str = DEFAULT, other: str = "least-accurate") -> list[tuple[Summary, Summary]]:
        """Two policies on each trace that has both."""
        both = ((self.get(trace, policy), self.get(trace, other)) for trace in self.traces)
        return [(a, b) for a, b in both if a is not None and b is not None]


def findings(rows: Iterable[CellResult]) -> list[Finding]:
    """What there is to compare in these rows; what was not run is left out.

    >>> row = dict(preset="acceleration", trace="t", scale=1.9, policy="slackfit", seed=0, accuracy=76.0, fluid_accuracy=76.1)
    >>> findings([{**row, "attainment": 0.995, "rate_qps": 7000.0}])[0]
    Finding(preset='acceleration', scale=1.9, what='attainment', reference='0.991 to 1.0', ours='0.9950')
    """
    found = []
    groups: dict[tuple[str, float], list[Summary]] = {}
    for s in summarize(rows):
        groups.setdefault((s.preset, s.scale), []).append(s)
    for (preset, scale), summaries in groups.items():
        if preset in _READERS:
            found += [Finding(preset, scale, *line) for line in _READERS[preset](_Table(summaries))]
    return found


_Lines = Iterator[tuple[str, str, str]]


def _maf(table: _Table) -> _Lines:
    yield from _attainment(table, "0.99999")
    yield from _loss(table)
    for policy in (DEFAULT, PAPER):
        for trace, g in gains(table.all, policy).items():
            name = "" if policy == DEFAULT else f", {policy}"
            s, least = table.get(trace, policy), table.get(trace, "fixed:0")
            assert s is not None
            limit = (
                f"; {s.fluid_accuracy - least.accuracy:+.2f} from the least accurate model to the fluid bound" if least else ""
            )
            yield (
                f"accuracy at equal attainment{name}",
                "+4.67 points",
                f"{g.points_line:+.2f} on the lines, {g.points:+.2f} strictly{limit}",
            )
            yield f"attainment at equal accuracy{name}", "2.85x", f"{g.times_line:.2f}x on the lines, {g.times:.3g}x strictly"


def _bursty(table: _Table) -> _Lines:
    yield from _attainment(table, "> 0.999")
    yield from _loss(table)
    yield (
        "accuracy above the least accurate model",
        "+4.33 points",
        _range((a.accuracy - b.accuracy for a, b in table.pairs()), "+.2f"),
    )
    if g := list(gains(table.all, DEFAULT).values()):
        yield "accuracy at equal attainment, on the lines", "+4.33 points", _range((x.points_line for x in g), "+.2f")
        yield "the same, strictly", "+4.33 points", _range((x.points for x in g), "+.2f")
        yield "attainment at equal accuracy, on the lines", "2.06x", _range((x.times_line for x in g), ".2f", "x")
        yield "the same, strictly", "2.06x", _range((x.times for x in g), ".3g", "x")
    for goal, low, high in (("0.7", 0, 5000), ("0.3", 5000, math.inf)):
        cells = [s for s in table.of(DEFAULT) if low <= s.mean("rate_qps") < high]
        where = "around 4,450 queries/s" if high < math.inf else "at 6,000 queries/s and more"
        yield (
            f"points below the fluid bound {where}",
            f"goal: {goal}",
            _range((s.fluid_accuracy - s.accuracy for s in cells), ".2f"),
        )


def _acceleration(table: _Table) -> _Lines:
    yield from _attainment(table, "0.991 to 1.0")
    yield from _loss(table)
    yield "points below the fluid bound", "-", _range((s.fluid_accuracy - s.accuracy for s in table.of(DEFAULT)), ".2f")


def _policies(table: _Table) -> _Lines:
    for policy, reference in (
        (DEFAULT, "0.999"),
        (PAPER, "0.999"),
        ("max-batch", "up to 0.05 less at cv2=8"),
        ("max-acc", "diverges"),
    ):
        if cells := table.of(policy):
            ours = ", ".join(f"{s.attainment:.4f} at {s.trace.split()[-1]}" for s in cells)
            yield f"attainment of {policy}", reference, ours


def _faults(table: _Table) -> _Lines:
    yield from _attainment(table, "0.999")
    for s in table.of(DEFAULT):
        ours = f"{s.mean('accuracy_first'):.2f} % with 8 workers, {s.mean('accuracy_last'):.2f} % with 4"
        yield "accuracy in the first and the last 12 s", "falls by itself", ours


def _scale(table: _Table) -> _Lines:
    cells = {s.mean("workers"): s.mean("rate_qps") for s in table.of(DEFAULT)}
    if cells:
        most, fewest = max(cells), min(cells)
        yield f"queries/s at {runner.SUSTAINED} with {most:.0f} workers", "about 33,000", f"{cells[most]:,.0f}"
        yield f"per worker, against {fewest:.0f}", "linear", f"{cells[most] / most / (cells[fewest] / fewest):.3f}"


def _actuation(table: _Table) -> _Lines:
    for policy in (DEFAULT, PAPER, "proteus"):
        misses = {s.mean("actuation_ms"): 1 - s.attainment for s in table.of(policy)}
        for ms, reference in ((0.0, "0 %"), (1.0, "-"), (100.0, "2 %")):
            if ms in misses:
                yield f"missed at {ms:g} ms per change, {policy}", reference, f"{100 * misses[ms]:.2g} %"


def _capacity(table: _Table) -> _Lines:
    fixed = sorted((s for s in table.all if s.policy.startswith("fixed:")), key=lambda s: s.accuracy)
    if fixed:
        ours = ", ".join(f"{s.mean('rate_qps'):,.0f} at {s.accuracy:.1f} %" for s in (fixed[-1], fixed[0]))
        yield "sustained queries/s of a fixed model", "about 2,000 at 80 %, 8,000 at 74 %", ours
    # Of evenly spaced arrivals the fluid bound is within reach.
    yield "points below the fluid bound", "-", _range((s.fluid_accuracy - s.accuracy for s in table.of(DEFAULT)), ".2f")


def _slowdown(table: _Table) -> _Lines:
    for reading in (PAPER, "slackfit-cumulative"):
        swept = {n: table.get(presets.HARDEST.name, f"{reading}:{n}") for n in presets.BUCKETS}
        if known := {n: s for n, s in swept.items() if s is not None}:
            ours = ", ".join(f"{n}: {s.attainment:.3f}" for n, s in known.items())
            yield f"attainment by latency buckets, {reading}", "number not given", ours
    if cells := [s for s in table.of(DEFAULT) if "stall" not in s.trace]:
        yield "attainment of the guarded policy", "-", _range((s.attainment for s in cells), ".4f")
    for s in table.of(DEFAULT):
        if not math.isnan(after := s.mean("last_miss_s")):
            yield f"{s.trace}: last miss after it", "goal: < 1 s", f"{after:.2f} s"


def _decisions(table: _Table) -> _Lines:
    for s in table.all:
        ours = f"{s.mean('decision_p50_us'):.1f} and {s.mean('decision_p99_us'):.1f} us"
        yield f"decision of {s.policy}, {presets.DENSE} subnets", "sub-ms; goal: p50 10 us, p99 50 us", ours


def _attainment(table: _Table, reference: str) -> _Lines:
    yield "attainment", reference, _range((s.attainment for s in table.of(DEFAULT)), ".4f")


def _loss(table: _Table) -> _Lines:
    yield (
        "less than the least accurate model attains",
        "goal: 0.001",
        _range((b.attainment - a.attainment for a, b in table.pairs()), "+.4f"),
    )


def _range(values: Iterable[float], form: str, unit: str = "") -> str:
    """The lowest and the highest."""
    known = sorted(v for v in values if not math.isnan(v))
    ends = list(dict.fromkeys(f"{v:{form}}{unit}" for v in known[:1] + known[-1:]))
    return " to ".join(ends) or "not run"


_READERS: Mapping[str, Callable[[_Table], _Lines]] = {
    "maf": _maf,
    "bursty": _bursty,
    "acceleration": _acceleration,
    "policies": _policies,
    "faults": _faults,
    "scale": _scale,
    "actuation": _actuation,
    "capacity": _capacity,
    "slowdown": _slowdown,
    "decisions": _decisions,
}
