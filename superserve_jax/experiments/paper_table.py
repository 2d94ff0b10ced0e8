"""A table of the paper's numbers and ours. If the paper has no number, the table shows this project's goal or "-". No jax."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from superserve_jax.experiments import presets, runner
from superserve_jax.experiments.runner import CellResult
from superserve_jax.experiments.summaries import Summary, gains, grouped, summarize

DEFAULT, PAPER = "slackfit", "slackfit-paper"


class Comparison(NamedTuple):
    """One line of the table.

    Args:
      preset: the experiment.
      scale: how many times slower the device is than in the profile.
      what: the compared quantity. It belongs to the default policy unless the text names another one.
      paper: the paper's number, "goal: ..." for this project's goal, or "-" for neither.
      ours: our number. With several traces, the lowest and the highest one.
    """

    preset: str
    scale: float
    what: str
    paper: str
    ours: str


_Lines = Iterator[tuple[str, str, str]]


class _Experiment:
    """The summaries of one preset at one scale."""

    def __init__(self, summaries: list[Summary]):
        self.all = summaries
        self._by_key = {(s.trace, s.policy): s for s in summaries}

    def get(self, trace: str, policy: str) -> Summary | None:
        """A policy's summary on a trace; None if it was not run."""
        return self._by_key.get((trace, policy))

    def of(self, policy: str = DEFAULT) -> list[Summary]:
        """A policy's summaries, one for each trace."""
        return [s for s in self.all if s.policy == policy]

    def above_least(self, key: str) -> list[float]:
        """On each trace, a value of the default policy minus the same value of the least accurate model."""
        least = [self.get(s.trace, "least-accurate") or self.get(s.trace, "fixed:0") for s in self.of()]
        return [s.mean(key) - other.mean(key) for s, other in zip(self.of(), least, strict=True) if other is not None]


def compare(results: Iterable[CellResult]) -> list[Comparison]:
    """All comparisons that the results contain the numbers for.

    >>> result = dict(preset="acceleration", trace="t", scale=1.9, policy="slackfit", seed=0, accuracy=76.0)
    >>> compare([{**result, "attainment": 0.995, "fluid_accuracy": 76.1}])[0]
    Comparison(preset='acceleration', scale=1.9, what='attainment', paper='0.991 to 1.0', ours='0.9950')
    """
    experiments = grouped(summarize(results), lambda s: (s.preset, s.scale))
    return [
        Comparison(preset, scale, *line)
        for (preset, scale), summaries in experiments.items()
        if preset in _READERS
        for line in _READERS[preset](_Experiment(summaries))
    ]


def _maf(e: _Experiment) -> _Lines:
    yield from _attainment(e, "0.99999")
    for policy in (DEFAULT, PAPER):
        for trace, g in gains(e.all, policy).items():
            name = "" if policy == DEFAULT else f", {policy}"
            s, least = e.get(trace, policy), e.get(trace, "fixed:0")
            limit = s.below_bound + s.accuracy - least.accuracy if s and least else math.nan
            yield (
                f"accuracy at equal attainment{name}",
                "+4.67 points",
                f"{g.points_line:+.2f} on the lines, {g.points:+.2f} strictly"
                + (f"; {limit:+.2f} from the least accurate model to the fluid bound" if least else ""),
            )
            yield f"attainment at equal accuracy{name}", "2.85x", f"{g.times_line:.2f}x on the lines, {g.times:.3g}x strictly"


def _bursty(e: _Experiment) -> _Lines:
    yield from _attainment(e, "> 0.999")
    yield "accuracy above the least accurate model", "+4.33 points", _range(e.above_least("accuracy"), "+.2f")
    if g := list(gains(e.all, DEFAULT).values()):
        yield "accuracy at equal attainment, on the lines", "+4.33 points", _range((x.points_line for x in g), "+.2f")
        yield "accuracy at equal attainment, strictly", "+4.33 points", _range((x.points for x in g), "+.2f")
        yield "attainment at equal accuracy, on the lines", "2.06x", _range((x.times_line for x in g), ".2f", "x")
        yield "attainment at equal accuracy, strictly", "2.06x", _range((x.times for x in g), ".3g", "x")
    for goal, low, high, where in (
        ("0.7", 0, 5000, "around 4,450 queries/s"),
        ("0.3", 5000, math.inf, "at 6,000 queries/s and more"),
    ):
        gaps = (s.below_bound for s in e.of() if low <= s.mean("rate_qps") < high)
        yield f"points below the fluid bound {where}", f"goal: {goal}", _range(gaps, ".2f")


def _acceleration(e: _Experiment) -> _Lines:
    yield from _attainment(e, "0.991 to 1.0")
    yield "points below the fluid bound", "-", _range((s.below_bound for s in e.of()), ".2f")


def _policies(e: _Experiment) -> _Lines:
    papers = {DEFAULT: "0.999", PAPER: "0.999", "max-batch": "up to 0.05 less at cv2=8", "max-acc": "diverges"}
    for policy, paper in papers.items():
        if summaries := e.of(policy):
            ours = ", ".join(f"{s.attainment:.4f} at {s.trace.split()[-1]}" for s in summaries)
            yield f"attainment of {policy}", paper, ours


def _worker_kills(e: _Experiment) -> _Lines:
    yield from _attainment(e, "0.999", loss=False)
    for s in e.of():
        ours = f"{s.mean('accuracy_first'):.2f} % with 8 workers, {s.mean('accuracy_last'):.2f} % with 4"
        yield "accuracy over the first and the last fifth", "falls as workers die", ours


def _dynamics(e: _Experiment) -> _Lines:
    for s in e.of():
        yield f"{s.trace}: attainment", "-", f"{s.attainment:.4f}"
        yield f"{s.trace}: points below the fluid bound", "-", f"{s.below_bound:.2f}"


def _scale(e: _Experiment) -> _Lines:
    rates = {s.mean("workers"): s.mean("rate_qps") for s in e.of()}
    if rates:
        most, fewest = max(rates), min(rates)
        yield f"queries/s at {runner.SUSTAINED} with {most:.0f} workers", "about 33,000", f"{rates[most]:,.0f}"
        yield (
            f"queries/s per worker, relative to {fewest:.0f} worker(s)",
            "linear",
            f"{rates[most] / most / (rates[fewest] / fewest):.3f}",
        )


def _actuation(e: _Experiment) -> _Lines:
    for policy in (DEFAULT, PAPER, "proteus"):
        misses = {s.mean("actuation_ms"): 1 - s.attainment for s in e.of(policy)}
        for ms, paper in ((0.0, "0 %"), (1.0, "-"), (100.0, "2 %")):
            if ms in misses:
                yield f"missed deadlines at {ms:g} ms per change, {policy}", paper, f"{100 * misses[ms]:.2g} %"


def _capacity(e: _Experiment) -> _Lines:
    if fixed := sorted((s for s in e.all if s.fixed), key=lambda s: s.accuracy):
        ours = ", ".join(f"{s.mean('rate_qps'):,.0f} at {s.accuracy:.1f} %" for s in (fixed[-1], fixed[0]))
        yield "sustained queries/s of a fixed model", "about 2,000 at 80 %, 8,000 at 74 %", ours
    # With evenly spaced arrivals a policy can reach the fluid bound.
    yield "points below the fluid bound", "-", _range((s.below_bound for s in e.of()), ".2f")


def _slowdown(e: _Experiment) -> _Lines:
    for rule in (PAPER, "slackfit-cumulative"):
        swept = {n: e.get(presets.HARDEST.name, f"{rule}:{n}") for n in presets.LATENCY_BUCKETS}
        if ours := ", ".join(f"{n}: {s.attainment:.3f}" for n, s in swept.items() if s is not None):
            yield f"attainment by latency buckets, {rule}", "no number given", ours
    if summaries := [s for s in e.of() if "stall" not in s.trace]:
        yield "attainment of the default policy", "-", _range((s.attainment for s in summaries), ".4f")
    for s in e.of():
        if not math.isnan(after := s.mean("last_miss_s")):
            yield f"{s.trace}: from the stall's end to the last miss", "goal: < 1 s", f"{after:.2f} s"


def _decisions(e: _Experiment) -> _Lines:
    for s in e.all:
        ours = f"{s.mean('decision_p50_us'):.1f} and {s.mean('decision_p99_us'):.1f} us"
        yield (
            f"time of a decision, p50 and p99, {s.policy}, {presets.DENSE} subnets",
            "sub-ms; goal: p50 10 us, p99 50 us",
            ours,
        )


def _attainment(e: _Experiment, paper: str, *, loss: bool = True) -> _Lines:
    yield "attainment", paper, _range((s.attainment for s in e.of()), ".4f")
    if loss:
        losses = (-above for above in e.above_least("attainment"))
        yield "attainment below the least accurate model's", "goal: 0.001", _range(losses, "+.4f")


def _range(values: Iterable[float], form: str, unit: str = "") -> str:
    """The lowest and the highest value as text, such as "0.5 to 0.7"."""
    known = sorted(v for v in values if not math.isnan(v))
    ends = list(dict.fromkeys(f"{v:{form}}{unit}" for v in known[:1] + known[-1:]))
    return " to ".join(ends) or "not run"


_READERS: Mapping[str, Callable[[_Experiment], _Lines]] = {
    "maf": _maf,
    "bursty": _bursty,
    "acceleration": _acceleration,
    "policies": _policies,
    "worker_kills": _worker_kills,
    "dynamics": _dynamics,
    "scale": _scale,
    "scale_batches": _scale,
    "actuation": _actuation,
    "actuation_maf": _actuation,
    "capacity": _capacity,
    "slowdown": _slowdown,
    "decisions": _decisions,
}
