"""The paper's figures, drawn from results as PNG files. No jax.

`draw` needs results only: attainment against accuracy (Figures 8 to 11), and the sweeps (Figures 1, 5c, 11, and the number of
latency buckets). `draw_over_time` simulates again, for runs over time (Figures 8 to 11 and 13). `draw_profile` draws the
latencies and FLOPs of the profile (Figures 6 and 12). Attainment and accuracy are in percent. Every sweep shows the fluid
bound (see `simulation.bounds`). The numbers of the figures are from memory, like the profile (`simulation.paper_profile`).
"""

import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from superserve_jax import plots
from superserve_jax.experiments import presets, runner
from superserve_jax.experiments.presets import Cell
from superserve_jax.experiments.runner import CellResult
from superserve_jax.experiments.summaries import Summary, grouped, summarize
from superserve_jax.plots import Line, Panel, Timeline
from superserve_jax.profile import Profile
from superserve_jax.scheduling import policies

TITLES: Mapping[str, str] = {
    "maf": "A sample of Azure Functions 2019 (as the paper's Figure 8)",
    "bursty": "Bursty traffic (as the paper's Figure 9)",
    "acceleration": "Accelerating traffic (as the paper's Figure 10)",
    "policies": "Policies on bursty traffic (as the paper's Figure 11)",
    "worker_kills": "One worker lost every 12 s (as the paper's Figure 11)",
    "dynamics": "Four synthetic traces over time (as the paper's Figure 13)",
    "scale": "More and more workers (as the paper's Figure 11)",
    "scale_batches": "More and more workers, clients send 8 queries at once (as the paper's Figure 11)",
    "actuation": "A delay for each change of the subnet, bursty traffic (as the paper's Figure 1)",
    "actuation_maf": "A delay for each change of the subnet, Azure sample (as the paper's Figure 1)",
    "capacity": "Throughput and accuracy of 8 workers (as the paper's Figure 5c)",
    "slowdown": "The number of latency buckets (not in the paper)",
    "trace": "Recorded traffic",
}
_OVER_TIME = ("maf", "bursty", "acceleration", "worker_kills", "dynamics", "trace")
_AGAINST_ACCURACY = ("maf", "bursty", "acceleration", "policies", "trace")
_FROM_MEMORY = ("dynamics", "scale_batches", "actuation", "actuation_maf")  # see `presets.PRESETS`
_BOUND, _ATTAINMENT, _ACCURACY = "fluid bound", "SLO attainment (%)", "mean serving accuracy (%)"


class _Sweep(NamedTuple):
    """What a sweep draws from: the summaries of a preset at one scale, and the profile at that scale."""

    title: str
    group: Sequence[Summary]
    profile: Profile


def draw(results: Iterable[CellResult], folder: pathlib.Path, profile: Profile) -> Iterator[pathlib.Path]:
    """Draws the figures of every preset in `results`, and yields the files. `profile` is the profile at scale 1."""
    for preset, summaries in grouped(summarize(results), lambda s: s.preset).items():
        note = _note(profile, preset)
        scales = grouped(summaries, lambda s: s.scale)
        if preset in _AGAINST_ACCURACY:
            for scale, group in scales.items():
                path = folder / f"{preset}_x{scale:g}.png"
                shown = [_tradeoff(trace, own) for trace, own in grouped(group, lambda s: s.trace).items()]
                plots.panels(shown, path, title=f"{TITLES[preset]}\n{_device(scale)}", note=note)
                yield path
        elif preset in _SWEEPS:
            sweeps = [_Sweep(_device(scale), group, profile.scaled(scale)) for scale, group in scales.items()]
            if shown := [panel for sweep in sweeps for panel in _SWEEPS[preset](sweep)]:
                plots.panels(shown, folder / f"{preset}.png", columns=2, title=TITLES[preset], note=note)
                yield folder / f"{preset}.png"


def draw_over_time(
    cells: Sequence[Cell], profile: Profile, folder: pathlib.Path, *, maf_trace: str | None = None
) -> Iterator[pathlib.Path]:
    """Simulates and draws runs over time, and yields the files: one per scale, for the presets in `_OVER_TIME` only.

    A file of "dynamics" shows all its traces, any other file shows the preset's last trace. Each shows the first seed and at
    most three policies, but all of your own. The note names the policies that are left out.
    """
    for (preset, scale), group in grouped(cells, lambda c: (c.preset, c.scale)).items():
        if preset not in _OVER_TIME:
            continue
        firsts = {cell.trace: cell for cell in reversed(group)}  # the first seed of each trace
        shown = list(firsts.values())[::-1] if preset == "dynamics" else [firsts[group[-1].trace]]
        names = _over_time(shown[0].policies)
        columns = [_timeline(cell, names, profile, maf_trace) for cell in shown]
        left_out = [n for n in shown[0].policies if n not in names and not n.startswith("fixed:")]
        left_out += ["fixed models"] * any(n.startswith("fixed:") and n not in names for n in shown[0].policies)
        note = _note(profile, preset) + f"; not shown: {', '.join(left_out)}" * bool(left_out)
        path = folder / f"{preset}_over_time_x{scale:g}.png"
        plots.timelines(columns, path, title=f"{TITLES[preset]}\n{_device(scale)}", note=note)
        yield path


def draw_profile(profile: Profile, folder: pathlib.Path, *, slo_ms: float = presets.SLO_MS) -> Iterator[pathlib.Path]:
    """Draws heat maps of latency and, if the subnets have an axis `gflops`, of FLOPs. Yields the files."""
    sizes, accuracies = list(map(str, profile.batch_sizes)), [row.accuracy for row in profile.rows]
    title = "Latency of a batch (as the paper's Figure 6)"
    latencies = [row.latency_ms for row in profile.rows]
    note = f"latencies: {profile.device}"
    plots.latencies(latencies, sizes, accuracies, folder / "latency.png", title=title, note=note, slo_ms=slo_ms)
    yield folder / "latency.png"
    gflops = [dict(row.subnet.axes).get("gflops", (math.nan,))[0] for row in profile.rows]
    if not any(map(math.isnan, gflops)):
        values = [[g * size for size in profile.batch_sizes] for g in gflops]
        title = "FLOPs of a batch (as the paper's Figure 12)"
        note = "GFLOPs of the subnets: from memory, unverified"
        plots.flops(values, sizes, accuracies, folder / "flops.png", title=title, note=note)
        yield folder / "flops.png"


def _device(scale: float) -> str:
    return "the profile's latencies" if scale == 1 else f"the profile's latencies x {scale:g}"


def _note(profile: Profile, preset: str) -> str:
    if preset == "trace":
        return f"latencies: {profile.device}"
    settings = "the paper's text and from memory" if preset in _FROM_MEMORY else "the paper's text"
    return f"ours, settings from {settings}, SLO {presets.SLO_MS:g} ms; latencies: {profile.device}"


def _over_time(names: Sequence[str]) -> list[str]:
    """The policies that a figure over time shows: your own, and others up to three. Fixed models only if there is no other."""
    adaptive = [n for n in names if not n.startswith("fixed:")]
    own = [n for n in adaptive if policies.is_custom(n)]
    others = [n for n in adaptive if n not in own][: max(3 - len(own), 0)]
    return [n for n in adaptive if n in own or n in others] or list(names[:1])


def _timeline(cell: Cell, names: Sequence[str], profile: Profile, maf_trace: str | None) -> Timeline:
    window_s = 0.5 if cell.preset == "maf" else 0.25
    labels = policies.labels(cell.policies)
    runs = {labels[n]: runner.timeline(cell, n, profile, maf_trace=maf_trace, window_s=window_s) for n in names}
    marks_s = sorted(o.from_s for o in cell.cluster.outages)
    slo_ms = None if cell.preset == "trace" else presets.SLO_MS  # recorded queries may have SLOs of their own
    return Timeline(runs, cell.trace, marks_s, slo_ms)


def _tradeoff(trace: str, group: Sequence[Summary]) -> Panel:
    """Attainment against accuracy: the fixed models on a line, each policy a point, and the fluid bound."""
    lines = {
        s.policy: _percent([s.accuracy], [s.attainment], [s.sd("attainment")], [s.sd("accuracy")], style=marker)
        for s, marker in zip((s for s in group if not s.fixed), itertools.cycle("ovsD^P"), strict=False)
    }
    if fixed := _fixed(group):
        lines["fixed models"] = _percent([s.accuracy for s in fixed], [s.attainment for s in fixed], style="s--", color="0.7")
    bound = group[0]
    lines[_BOUND] = _percent([bound.mean("fluid_accuracy")], [bound.mean("fluid_attainment")], style="*", color="black")
    return Panel(trace, _ACCURACY, _ATTAINMENT, lines, most_y=100)


def _scale(sweep: _Sweep) -> Iterator[Panel]:
    styles = itertools.cycle(("o-", "x:", "+--"))
    policies = _by_policy(sweep.group)
    lines = {name: _line(own, "workers", "rate_qps", style=next(styles)) for name, own in policies.items()}
    workers = [s.mean("workers") for s in next(iter(policies.values()))]
    fastest_qps = sweep.profile.throughput_qps(sweep.profile.rows[0].subnet)
    lines[_BOUND] = Line(workers, [n * fastest_qps for n in workers], style=":", color="black")
    yield Panel(sweep.title, "workers", f"queries/s at {_sustained()}", lines)


def _actuation(sweep: _Sweep) -> Iterator[Panel]:
    policies = _by_policy(sweep.group)
    for what, key, factor in ((_ATTAINMENT, "attainment", 100), (_ACCURACY, "accuracy", 1)):
        lines = {
            name: Line([s.mean("actuation_ms") for s in own], [factor * s.mean(key) for s in own])
            for name, own in policies.items()
        }
        own = next(iter(policies.values()))
        delays, bound = [s.mean("actuation_ms") for s in own], [factor * s.mean(f"fluid_{key}") for s in own]
        lines[f"{_BOUND}, no delay"] = Line(delays, bound, style=":", color="black")
        yield Panel(sweep.title, "delay per change of the subnet (ms)", what, lines, "symlog", most_y=_most(what))


def _capacity(sweep: _Sweep) -> Iterator[Panel]:
    policies = _by_policy(s for s in sweep.group if not s.fixed)
    lines = {
        name: _line([s for s in own if s.attainment >= runner.SUSTAINED], "rate_qps", "accuracy")
        for name, own in policies.items()
    }
    by_rate = sorted(sweep.group, key=lambda s: s.mean("rate_qps"))
    lines[_BOUND] = _line(by_rate, "rate_qps", "fluid_accuracy", style=":", color="black")
    if fixed := _fixed(sweep.group):
        lines["fixed models"] = _line(fixed, "rate_qps", "accuracy", style="s--", color="0.7")
    yield Panel(sweep.title, f"queries/s at {_sustained()} or more", _ACCURACY, lines)


def _slowdown(sweep: _Sweep) -> Iterator[Panel]:
    """The sweep over the number of latency buckets. The preset's other results appear only in the table."""
    hardest = {s.policy: s for s in sweep.group if s.trace == presets.HARDEST.name}
    swept = {
        rule: {n: s for n in presets.LATENCY_BUCKETS if (s := hardest.get(f"{rule}:{n}")) is not None}
        for rule in ("slackfit-paper", "slackfit-cumulative")
    }
    if not any(swept.values()):
        return
    ends = [presets.LATENCY_BUCKETS[0], presets.LATENCY_BUCKETS[-1]]
    for what, key, factor in ((_ATTAINMENT, "attainment", 100), (_ACCURACY, "accuracy", 1)):
        lines = {
            rule: Line(
                list(by_count),
                [factor * s.mean(key) for s in by_count.values()],
                [factor * s.sd(key) for s in by_count.values()],
            )
            for rule, by_count in swept.items()
        }
        for name in ("slackfit", "max-batch"):
            if name in hardest:
                lines[name] = Line(ends, [factor * hardest[name].mean(key)] * 2, style="--")
        bound = next(iter(hardest.values())).mean(f"fluid_{key}")
        lines[_BOUND] = Line(ends, [factor * bound] * 2, style=":", color="black")
        yield Panel(f"{presets.HARDEST.name}, {sweep.title}", "latency buckets", what, lines, "log2", most_y=_most(what))


_SWEEPS: Mapping[str, Callable[[_Sweep], Iterator[Panel]]] = {
    "scale": _scale,
    "scale_batches": _scale,
    "actuation": _actuation,
    "actuation_maf": _actuation,
    "capacity": _capacity,
    "slowdown": _slowdown,
}


def _sustained() -> str:
    return f"{100 * runner.SUSTAINED:g} % SLO attainment"


def _most(what: str) -> float | None:
    return 100 if what == _ATTAINMENT else None


def _percent(
    accuracy: Sequence[float],
    attainment: Sequence[float],
    spread: Sequence[float] | None = None,
    spread_x: Sequence[float] | None = None,
    *,
    style: str,
    color: str | None = None,
) -> Line:
    """Attainments, as fractions, over accuracies in percent."""
    in_percent = None if spread is None else [100 * s for s in spread]
    return Line(accuracy, [100 * a for a in attainment], in_percent, spread_x, style=style, color=color)


def _line(group: Sequence[Summary], x: str, y: str, *, style: str = "o-", color: str | None = None) -> Line:
    return Line([s.mean(x) for s in group], [s.mean(y) for s in group], style=style, color=color)


def _fixed(group: Iterable[Summary]) -> list[Summary]:
    return sorted((s for s in group if s.fixed and not math.isnan(s.accuracy)), key=lambda s: s.accuracy)


def _by_policy(group: Iterable[Summary]) -> Mapping[str, list[Summary]]:
    return grouped(group, lambda s: s.policy)
