"""Plots of results, as PNG files. Matplotlib's object interface: no global figure, no display."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure, ticker

Path = str | os.PathLike[str]


def metrics(lines: Sequence[Mapping[str, Any]], path: Path, *, validation: Sequence[Mapping[str, Any]] = ()) -> None:
    """The course of training: losses and the largest subnet's training accuracy over steps.

    Args:
      lines: the run's metrics, with "step", "loss", "accuracy" and, where other subnets are trained, "loss_smallest".
      path: of the PNG.
      validation: validation accuracies, with "step" and one value per name of a subnet.
    """
    fig = figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = fig.subplots(1, 2)
    steps = [m["step"] for m in lines]
    left.plot(steps, [m["loss"] for m in lines], label="largest, against labels")
    left.plot(steps, [m.get("loss_smallest", float("nan")) for m in lines], label="smallest, distilled")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    right.plot(steps, [100 * m["accuracy"] for m in lines], label="largest, training")
    for name in validation[0].keys() - {"step"} if validation else ():
        right.plot([v["step"] for v in validation], [100 * v[name] for v in validation], "o-", label=f"{name}, validation")
    right.set(xlabel="step", ylabel="accuracy (%)")
    right.legend()
    fig.savefig(path, dpi=120)


def search(
    cloud: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    served: Sequence[tuple[float, float]],
    path: Path,
    *,
    cost: str,
) -> None:
    """The search's candidates, its Pareto front and the subnets chosen, each as (cost, accuracy as a fraction).

    Args:
      cost: what the cost is, with its unit.
    """
    fig = figure.Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    axes.scatter(*_columns(cloud), s=12, color="0.6", label="candidates")
    axes.plot(*_columns(front), color="tab:blue", zorder=2.5, label="Pareto front")
    axes.scatter(*_columns(served), s=18, color="tab:orange", zorder=3, label="served")
    axes.set(xscale="log", xlabel=cost, ylabel="validation accuracy (%)")
    axes.legend()
    fig.savefig(path, dpi=120)


def replay(runs: Mapping[str, Any], path: Path, *, marks_s: Sequence[float] = ()) -> None:
    """Traffic over time, one line per policy: arrival rate, batch size, subnet accuracy, SLO attainment.

    Args:
      runs: `simulation.metrics.Series` by policy, all of the same trace.
      path: of the PNG.
      marks_s: times at which something happens, such as the loss of a worker.
    """
    fig = figure.Figure(figsize=(10, 8), layout="constrained")
    panels = fig.subplots(4, 1, sharex=True)
    first = next(iter(runs.values()))
    panels[0].plot(first.time_s, first.rate_qps, color="0.3", drawstyle="steps-mid")
    for name, run in runs.items():
        panels[1].plot(run.time_s, run.batch, label=name, linewidth=1)
        panels[2].plot(run.time_s, 100 * run.accuracy, linewidth=1)
        panels[3].plot(run.time_s, 100 * run.attainment, linewidth=1)
    labels = ("arrivals (queries/s)", "batch size", "subnet accuracy (%)", "SLO attainment (%)")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        for mark in marks_s:
            axes.axvline(mark, color="tab:red", linestyle=":", linewidth=1)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(bottom=0)
    panels[3].set_xlabel("time (s)")
    fig.legend(loc="outside upper center", ncols=len(runs))
    fig.savefig(path, dpi=110)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line, or points: `x` and `y` of one length, `spread` the half length of error bars.

    Args:
      style: a matplotlib format, such as "o-"; a line of one colour for all panels if `color` is given, too.
    """

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    spread_x: Sequence[float] | None = None
    style: str = "o-"
    color: str | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines by label; `scale_x` is "linear", "log2" or "symlog", which shows 0."""

    title: str
    label_x: str
    label_y: str
    lines: Mapping[str, Line]
    scale_x: str = "linear"


def panels(shown: Sequence[Panel], path: Path, *, columns: int = 3, title: str = "") -> None:
    """Panels side by side, row by row, with one legend: what has the same label has the same colour."""
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    fig = figure.Figure(figsize=(max(4.2 * columns, 6), 3.2 * rows + 0.8), layout="constrained")
    grid = fig.subplots(rows, columns, squeeze=False)
    labels = list(dict.fromkeys(label for panel in shown for label in panel.lines))
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, shown, strict=False):
        for label, line in panel.lines.items():
            color = line.color or f"C{labels.index(label) % 10}"
            handles[label] = axes.errorbar(
                line.x,
                line.y,
                line.spread,
                line.spread_x,
                fmt=line.style,
                color=color,
                markersize=6,
                markerfacecolor="none" if len(line.x) == 1 else color,  # what lies beneath stays visible
                linewidth=1.4,
                capsize=2,
            )
        axes.set(title=panel.title, xlabel=panel.label_x, ylabel=panel.label_y)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        if panel.scale_x == "log2":
            axes.set_xscale("log", base=2)
            ticks = sorted({x for line in panel.lines.values() for x in line.x})
            ticks = [t for t in ticks if math.log2(t).is_integer()] or ticks
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        elif panel.scale_x == "symlog":
            axes.set_xscale("symlog", linthresh=min(x for line in panel.lines.values() for x in line.x if x > 0))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    if title:
        fig.suptitle(title)
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 2 * columns))
    fig.savefig(path, dpi=110)


def latencies(
    values_ms: Sequence[Sequence[float]], shapes: Sequence[str], accuracies: Sequence[float], path: Path, *, title: str
) -> None:
    """The latency of every subnet at every batch size as a heat map (the paper's Figure 6).

    Args:
      values_ms: [subnets][shapes].
      shapes: what the batches are, such as "16" or, with length buckets, "16 x 128".
      accuracies: [subnets], fractions of 1, ascending.
    """
    count = len(accuracies)
    fig = figure.Figure(figsize=(2 + 0.9 * len(shapes), 1.8 + 0.45 * min(count, 20)), layout="constrained")
    axes = fig.subplots()
    image = axes.imshow(values_ms, norm="log", cmap="viridis", aspect="auto", origin="lower")
    middle = math.sqrt(min(map(min, values_ms)) * max(map(max, values_ms)))
    if count <= 20:
        for i, row in enumerate(values_ms):
            for j, ms in enumerate(row):
                text = f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if ms < middle else "black")
    axes.set_xticks(range(len(shapes)), shapes)
    labelled = range(0, count, math.ceil(count / 20))
    axes.set_yticks(labelled, [f"{100 * accuracies[i]:.2f}" for i in labelled])
    label_x = "batch size x tokens" if "x" in shapes[0] else "batch size"
    axes.set(xlabel=label_x, ylabel="subnet, by its accuracy (%)", title=title)
    bar = fig.colorbar(image, label="latency of a batch (ms)", ticks=ticker.LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    fig.savefig(path, dpi=120)


def loading(sizes_mb: Sequence[float], ratios: Mapping[str, Sequence[float]], path: Path, *, title: str) -> None:
    """How many times as long as an inference it takes to load the weights of a network (the paper's Figure 1a).

    Args:
      sizes_mb: bytes of each network's weights, in millions.
      ratios: loading over inference of each, by where the weights are loaded from.
    """
    fig = figure.Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    for label, values in ratios.items():
        axes.plot(sizes_mb, values, "o-", label=label)
    axes.axhline(1, color="0.6", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="weights of the network (MB)", ylabel="loading / inference", title=title)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(path, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [p[0] for p in points], [100 * p[1] for p in points]
