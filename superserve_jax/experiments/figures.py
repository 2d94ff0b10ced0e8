"""The paper's figures from the rows of `evaluation`, as PNG files. No jax.

Attainment against accuracy (Figures 8 to 10), runs over time (Figures 11 and 13), actuation delay (Figure 1), sustained rate
against accuracy (Figure 5c), scalability, and the sweep over SlackFit's number of latency buckets.
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from superserve_jax import plots
from superserve_jax.experiments import presets, runner
from superserve_jax.experiments.presets import Cell
from superserve_jax.experiments.runner import CellResult
from superserve_jax.experiments.summaries import Summary, summarize
from superserve_jax.plots import Line, Panel
from superserve_jax.profile import Profile

_OVER_TIME = ("maf", "bursty", "acceleration", "faults")
_AGAINST_ACCURACY = ("maf", "bursty", "acceleration", "policies")


def draw(rows: Iterable[CellResult], folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draws what can be drawn of these rows, and yields the files."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = summarize(rows)
    for preset in dict.fromkeys(s.preset for s in summaries):
        of_preset = [s for s in summaries if s.preset == preset]
        if preset in _AGAINST_ACCURACY:
            for scale in dict.fromkeys(s.scale for s in of_preset):
                path = folder / f"{preset}_x{scale:g}.png"
                shown = [
                    _tradeoff(trace, group) for trace, group in _by_trace(s for s in of_preset if s.scale == scale).items()
                ]
                plots.panels(shown, path, title=f"{preset}, profile x{scale:g}")
                yield path
        elif preset in _CURVES:
            path = folder / f"{preset}.png"
            scales = dict.fromkeys(s.scale for s in of_preset)
            shown = [
                p
                for scale in scales
                for p in _CURVES[preset](f"profile x{scale:g}", [s for s in of_preset if s.scale == scale])
            ]
            if shown:
                plots.panels(shown, path, columns=2)
                yield path


def draw_over_time(
    cells: Sequence[Cell], profile: Profile, folder: pathlib.Path, *, maf_trace: str | None = None
) -> Iterator[pathlib.Path]:
    """Runs over time: of each preset and scale with such a figure the last trace, its first seed; yields the files."""
    folder.mkdir(parents=True, exist_ok=True)
    last = {(c.preset, c.scale): c.trace for c in cells if c.preset in _OVER_TIME}
    for (preset, scale), trace in last.items():
        first = next(c for c in cells if (c.preset, c.scale, c.trace) == (preset, scale, trace))
        names = [n for n in first.policies if not n.startswith("fixed:")][:3] or list(first.policies[:1])
        window_s = 0.5 if preset == "maf" else 0.25
        runs = {name: runner.timeline(first, name, profile, maf_trace=maf_trace, window_s=window_s) for name in names}
        path = folder / f"{preset}_over_time_x{scale:g}.png"
        plots.replay(runs, path, marks_s=sorted(o.from_s for o in first.cluster.outages))
        yield path


def _tradeoff(trace: str, group: Sequence[Summary]) -> Panel:
    """Attainment against accuracy: the fixed models on their lines, each policy a point."""
    fixed = sorted(
        (s for s in group if s.policy.startswith("fixed:") and not math.isnan(s.accuracy)), key=lambda s: s.accuracy
    )
    policies = [s for s in group if not s.policy.startswith("fixed:")]
    lines = {
        s.policy: Line([s.accuracy], [s.attainment], [s.attainment_sd], [s.accuracy_sd], style=marker)
        for s, marker in zip(policies, itertools.cycle("ovsD^P*"), strict=False)
    }
    if fixed:
        lines["fixed models"] = _line(fixed, lambda s: s.accuracy, lambda s: s.attainment, style="s--", color="0.5")
    return Panel(trace, "mean serving accuracy (%)", "SLO attainment", lines)


def _scale(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    lines = {
        name: _line(own, lambda s: s.mean("workers"), lambda s: s.mean("rate_qps"), style=style)
        for (name, own), style in zip(_by_policy(group).items(), itertools.cycle(("o-", "x:", "+--")), strict=False)
    }
    yield Panel(title, "workers", f"queries/s at {runner.SUSTAINED}", lines)


def _actuation(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    for what, value in (("missed deadlines (%)", lambda s: 100 * (1 - s.attainment)), ("accuracy (%)", lambda s: s.accuracy)):
        lines = {name: _line(own, lambda s: s.mean("actuation_ms"), value) for name, own in _by_policy(group).items()}
        yield Panel(title, "delay per change of subnet (ms)", what, lines, "symlog")


def _capacity(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    fixed = sorted((s for s in group if s.policy.startswith("fixed:")), key=lambda s: s.accuracy)
    own = {name: g for name, g in _by_policy(group).items() if not name.startswith("fixed:")}
    rate = lambda s: s.mean("rate_qps")  # noqa: E731
    lines = {
        name: _line([s for s in g if s.attainment >= runner.SUSTAINED], rate, lambda s: s.accuracy) for name, g in own.items()
    }
    if own:
        lines["fluid bound"] = _line(next(iter(own.values())), rate, lambda s: s.fluid_accuracy, style=":", color="black")
    if fixed:
        lines["fixed models"] = _line(fixed, rate, lambda s: s.accuracy, style="s--", color="0.5")
    yield Panel(title, f"queries/s at {runner.SUSTAINED} or more", "accuracy (%)", lines)


def _slowdown(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    """Only the sweep over the number of latency buckets; the rest is a table."""
    hardest = {s.policy: s for s in group if s.trace == presets.HARDEST.name}
    swept = {
        reading: [(n, s) for n in presets.BUCKETS if (s := hardest.get(f"{reading}:{n}")) is not None]
        for reading in ("slackfit-paper", "slackfit-cumulative")
    }
    if not any(swept.values()):
        return
    ends = [presets.BUCKETS[0], presets.BUCKETS[-1]]
    for what, value, spread in (
        ("SLO attainment", lambda s: s.attainment, lambda s: s.attainment_sd),
        ("accuracy (%)", lambda s: s.accuracy, lambda s: s.accuracy_sd),
    ):
        lines = {
            name: Line([n for n, _ in points], [value(s) for _, s in points], [spread(s) for _, s in points])
            for name, points in swept.items()
        }
        for name in ("slackfit", "max-batch"):
            if name in hardest:
                lines[name] = Line(ends, [value(hardest[name])] * 2, style="--")
        yield Panel(f"{presets.HARDEST.name}, {title}", "latency buckets", what, lines, "log2")


_CURVES = {"scale": _scale, "actuation": _actuation, "capacity": _capacity, "slowdown": _slowdown}


def _line(group: Sequence[Summary], x, y, **options) -> Line:
    return Line([x(s) for s in group], [y(s) for s in group], **options)


def _by_trace(summaries: Iterable[Summary]) -> Mapping[str, list[Summary]]:
    return _grouped(summaries, lambda s: s.trace)


def _by_policy(summaries: Iterable[Summary]) -> Mapping[str, list[Summary]]:
    return _grouped(summaries, lambda s: s.policy)


def _grouped(summaries: Iterable[Summary], key: Callable[[Summary], str]) -> Mapping[str, list[Summary]]:
    found: dict[str, list[Summary]] = {}
    for s in summaries:
        found.setdefault(key(s), []).append(s)
    return found
