"""The paper's figures, drawn from results as PNG files. No jax.

- Figure 1: missed deadlines and accuracy against the actuation delay
- Figure 5c: sustained rate against accuracy
- Figures 8 to 10: attainment against accuracy
- Figures 11 and 13: runs over time
- scalability, and the sweep over SlackFit's number of latency buckets
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from superserve_jax import plots
from superserve_jax.experiments import presets, runner
from superserve_jax.experiments.presets import Cell
from superserve_jax.experiments.runner import CellResult
from superserve_jax.experiments.summaries import Summary, grouped, summarize
from superserve_jax.plots import Line, Panel
from superserve_jax.profile import Profile

_OVER_TIME = ("maf", "bursty", "acceleration", "worker_kills")
_AGAINST_ACCURACY = ("maf", "bursty", "acceleration", "policies")


def draw(results: Iterable[CellResult], folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draws the figures of every preset in `results`, and yields the files."""
    for preset, summaries in grouped(summarize(results), lambda s: s.preset).items():
        scales = grouped(summaries, lambda s: s.scale)
        if preset in _AGAINST_ACCURACY:
            for scale, group in scales.items():
                path = folder / f"{preset}_x{scale:g}.png"
                shown = [_tradeoff(trace, own) for trace, own in grouped(group, lambda s: s.trace).items()]
                plots.panels(shown, path, title=f"{preset}, profile x{scale:g}")
                yield path
        elif preset in _CURVES:
            shown = [panel for scale, group in scales.items() for panel in _CURVES[preset](f"profile x{scale:g}", group)]
            if shown:
                plots.panels(shown, folder / f"{preset}.png", columns=2)
                yield folder / f"{preset}.png"


def draw_over_time(
    cells: Sequence[Cell], profile: Profile, folder: pathlib.Path, *, maf_trace: str | None = None
) -> Iterator[pathlib.Path]:
    """Simulates and draws runs over time, and yields the files: one per scale, for the presets in `_OVER_TIME` only.

    Each file shows the last trace with the first seed, and at most three policies.
    """
    for (preset, scale), group in grouped(cells, lambda c: (c.preset, c.scale)).items():
        if preset not in _OVER_TIME:
            continue
        cell = next(c for c in group if c.trace == group[-1].trace)
        names = [n for n in cell.policies if not n.startswith("fixed:")][:3] or list(cell.policies[:1])
        window_s = 0.5 if preset == "maf" else 0.25
        runs = {name: runner.timeline(cell, name, profile, maf_trace=maf_trace, window_s=window_s) for name in names}
        path = folder / f"{preset}_over_time_x{scale:g}.png"
        plots.replay(runs, path, marks_s=sorted(o.from_s for o in cell.cluster.outages))
        yield path


def _tradeoff(trace: str, group: Sequence[Summary]) -> Panel:
    """Attainment against accuracy: the fixed models on a line, each policy a point."""
    lines = {
        s.policy: Line([s.accuracy], [s.attainment], [s.sd("attainment")], [s.sd("accuracy")], style=marker)
        for s, marker in zip((s for s in group if not s.fixed), itertools.cycle("ovsD^P*"), strict=False)
    }
    if fixed := _fixed(group):
        lines["fixed models"] = _line(fixed, "accuracy", "attainment", style="s--", color="0.5")
    return Panel(trace, "mean serving accuracy (%)", "SLO attainment", lines)


def _scale(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    styles = itertools.cycle(("o-", "x:", "+--"))
    lines = {name: _line(own, "workers", "rate_qps", style=next(styles)) for name, own in _by_policy(group).items()}
    yield Panel(title, "workers", f"queries/s at {runner.SUSTAINED}", lines)


def _actuation(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    for what, value in (("missed deadlines (%)", lambda s: 100 * (1 - s.attainment)), ("accuracy (%)", lambda s: s.accuracy)):
        lines = {
            name: Line([s.mean("actuation_ms") for s in own], [value(s) for s in own])
            for name, own in _by_policy(group).items()
        }
        yield Panel(title, "delay per change of subnet (ms)", what, lines, "symlog")


def _capacity(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    policies = _by_policy(s for s in group if not s.fixed)
    lines = {
        name: _line([s for s in own if s.attainment >= runner.SUSTAINED], "rate_qps", "accuracy")
        for name, own in policies.items()
    }
    if policies:
        lines["fluid bound"] = _line(next(iter(policies.values())), "rate_qps", "fluid_accuracy", style=":", color="black")
    if fixed := _fixed(group):
        lines["fixed models"] = _line(fixed, "rate_qps", "accuracy", style="s--", color="0.5")
    yield Panel(title, f"queries/s at {runner.SUSTAINED} or more", "accuracy (%)", lines)


def _slowdown(title: str, group: Sequence[Summary]) -> Iterator[Panel]:
    """The sweep over the number of latency buckets. The preset's other results appear only in the table."""
    hardest = {s.policy: s for s in group if s.trace == presets.HARDEST.name}
    swept = {
        rule: {n: s for n in presets.LATENCY_BUCKETS if (s := hardest.get(f"{rule}:{n}")) is not None}
        for rule in ("slackfit-paper", "slackfit-cumulative")
    }
    if not any(swept.values()):
        return
    ends = [presets.LATENCY_BUCKETS[0], presets.LATENCY_BUCKETS[-1]]
    for what, key in (("SLO attainment", "attainment"), ("accuracy (%)", "accuracy")):
        lines = {
            rule: Line(list(by_count), [s.mean(key) for s in by_count.values()], [s.sd(key) for s in by_count.values()])
            for rule, by_count in swept.items()
        }
        for name in ("slackfit", "max-batch"):
            if name in hardest:
                lines[name] = Line(ends, [hardest[name].mean(key)] * 2, style="--")
        yield Panel(f"{presets.HARDEST.name}, {title}", "latency buckets", what, lines, "log2")


_CURVES: Mapping[str, Callable[[str, Sequence[Summary]], Iterator[Panel]]] = {
    "scale": _scale,
    "actuation": _actuation,
    "capacity": _capacity,
    "slowdown": _slowdown,
}


def _line(group: Sequence[Summary], x: str, y: str, *, style: str = "o-", color: str | None = None) -> Line:
    return Line([s.mean(x) for s in group], [s.mean(y) for s in group], style=style, color=color)


def _fixed(group: Iterable[Summary]) -> list[Summary]:
    return sorted((s for s in group if s.fixed and not math.isnan(s.accuracy)), key=lambda s: s.accuracy)


def _by_policy(group: Iterable[Summary]) -> Mapping[str, list[Summary]]:
    return grouped(group, lambda s: s.policy)
