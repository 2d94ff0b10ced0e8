"""Plots of results, as PNG files. They use matplotlib's object interface: no global figure, no display."""

import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib import figure, ticker

from superserve_jax import files

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line, or single points.

    Args:
      x: the points' x.
      y: the points' y, of the same length.
      spread: half the length of each vertical error bar.
      spread_x: half the length of each horizontal error bar.
      style: a matplotlib format, such as "o-".
      color: by default, lines with the same label have the same colour in all panels.
    """

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    spread_x: Sequence[float] | None = None
    style: str = "o-"
    color: str | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
      title: above the axes.
      label_x: the label of the x axis, with its unit.
      label_y: the label of the y axis, with its unit.
      lines: lines by label.
      scale_x: the scale of the x axis; "symlog" is logarithmic but also shows 0.
      scale_y: the scale of the y axis.
      most_y: the largest possible y, such as 100 for percent; the y axis does not go beyond it.
    """

    title: str
    label_x: str
    label_y: str
    lines: Mapping[str, Line]
    scale_x: Literal["linear", "log", "log2", "symlog"] = "linear"
    scale_y: Literal["linear", "log"] = "linear"
    most_y: float | None = None


def panels(shown: Sequence[Panel], path: Path, *, columns: int = 3, title: str = "", own_legends: bool = False) -> None:
    """Draws panels in `columns` columns, with one legend for all or with `own_legends`."""
    columns = min(columns, len(shown))
    count = math.ceil(len(shown) / columns)
    fig = figure.Figure(figsize=(max(4.2 * columns, 6), 3.2 * count + 0.8), layout="constrained")
    grid = fig.subplots(count, columns, squeeze=False)
    labels = list(dict.fromkeys(label for panel in shown for label in panel.lines))
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, shown, strict=False):
        for label, line in panel.lines.items():
            color = line.color or f"C{labels.index(label) % 10}"
            hollow = "none" if len(line.x) == 1 else color  # points beneath a single point stay visible
            looks = {"fmt": line.style, "color": color, "markersize": 6, "markerfacecolor": hollow, "linewidth": 1.4}
            handles[label] = axes.errorbar(line.x, line.y, line.spread, line.spread_x, **looks, capsize=2)
        axes.set(xlabel=panel.label_x, ylabel=panel.label_y, yscale=panel.scale_y)
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.3)
        if own_legends:
            axes.legend([handles[label] for label in panel.lines], panel.lines.keys(), fontsize=9)
        _scale_x(axes, panel)
        if panel.scale_y == "log":
            _plain_numbers(axes.yaxis)
        if panel.most_y is not None and axes.get_ylim()[1] > panel.most_y:
            axes.set_ylim(top=panel.most_y + 0.01 * (panel.most_y - axes.get_ylim()[0]))  # so that a line at the end is whole
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    if title:
        fig.suptitle(title)
    if not own_legends:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 2 * columns))
    _save(fig, path, dpi=110)


def _scale_x(axes: Any, panel: Panel) -> None:
    if panel.scale_x == "log2":
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in panel.lines.values() for x in line.x})
        ticks = [t for t in ticks if math.log2(t).is_integer()] or ticks
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    elif panel.scale_x == "symlog":
        axes.set_xscale("symlog", linthresh=min(x for line in panel.lines.values() for x in line.x if x > 0))
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xscale(panel.scale_x)
        if panel.scale_x == "log":
            _plain_numbers(axes.xaxis)


def _plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with 1, 2, 5, 10, 20 instead of powers of ten."""
    locator, minor = ticker.LogLocator(subs=(1, 2, 5)), ticker.NullFormatter()
    axis.set(major_locator=locator, major_formatter="{x:g}", minor_formatter=minor)


def metrics(
    lines: Sequence[Mapping[str, Any]], path: Path, *, validation: Sequence[Mapping[str, Any]] = (), title: str = ""
) -> None:
    """Plots losses and accuracies over the steps of a training run.

    Args:
      lines: the run's metrics, with "step", "loss", "accuracy" and, if other subnets are trained, "loss_smallest".
      path: the PNG file.
      validation: validation accuracies, with "step" and one value per name of a subnet.
      title: above the plot.
    """
    colors = {"largest": "C0", "middle": "C2", "smallest": "C1"}
    steps = [m["step"] for m in lines]
    losses = {
        "largest subnet, against the labels": Line(steps, [m["loss"] for m in lines], style="-", color=colors["largest"])
    }
    if any("loss_smallest" in m for m in lines):
        smallest = [m.get("loss_smallest", math.nan) for m in lines]
        losses["smallest subnet, against its teacher"] = Line(steps, smallest, style="-", color=colors["smallest"])
    training = [100 * m["accuracy"] for m in lines]
    accuracies = {"largest subnet, training batches": Line(steps, training, style=":", color=colors["largest"])}
    for name in [name for name in ("largest", "middle", "smallest") if validation and name in validation[0]]:
        at, measured = zip(*((v["step"], 100 * v[name]) for v in validation if name in v), strict=True)
        accuracies[f"{name} subnet, validation"] = Line(at, measured, color=colors[name])
    shown = (
        Panel("loss on training batches", "training step", "loss", losses),
        Panel("accuracy", "training step", "accuracy (%)", accuracies, most_y=100.0),
    )
    panels(shown, path, columns=2, title=title, own_legends=True)


def search(
    cloud: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    served: Sequence[tuple[float, float]],
    path: Path,
    *,
    cost: str,
    error: float = 0.0,
    title: str = "",
) -> None:
    """Plots the candidates of a search, its Pareto front, and the chosen subnets.

    Args:
      cloud: (cost, accuracy as a fraction) of each candidate.
      front: the same for the Pareto front.
      served: the same for the chosen subnets.
      path: the PNG file.
      cost: the name of the cost, with its unit.
      error: the standard error of an accuracy, as a fraction.
      title: above the plot.
    """
    styles = {
        f"candidates ({len(cloud)})": (cloud, ".", "0.6"),
        "Pareto front": (front, "-", "C0"),
        f"chosen to serve ({len(served)})" + ", with standard error" * (error > 0): (served, "o", "C1"),
    }
    lines = {
        label: Line(
            [c for c, _ in sorted(points)],
            [100 * a for _, a in sorted(points)],
            spread=[100 * error] * len(points) if points is served and error else None,
            style=style,
            color=color,
        )
        for label, (points, style, color) in styles.items()
    }
    panels([Panel("", cost, "validation accuracy (%)", lines, "log", most_y=100.0)], path, title=title)


def replay(runs: Mapping[str, Any], path: Path, *, marks_s: Sequence[float] = ()) -> None:
    """Plots traffic over time, with one line per policy: arrival rate, batch size, subnet accuracy, SLO attainment.

    Args:
      runs: a `simulation.metrics.Series` for each policy, all of the same trace.
      path: the PNG file.
      marks_s: times to mark, such as the loss of a worker.
    """
    fig = figure.Figure(figsize=(10, 8), layout="constrained")
    rate, batch, accuracy, attainment = fig.subplots(4, 1, sharex=True)
    first = next(iter(runs.values()))
    rate.plot(first.time_s, first.rate_qps, color="0.3", drawstyle="steps-mid")
    for name, run in runs.items():
        batch.plot(run.time_s, run.batch, label=name, linewidth=1)
        accuracy.plot(run.time_s, 100 * run.accuracy, linewidth=1)
        attainment.plot(run.time_s, 100 * run.attainment, linewidth=1)
    rate.set(ylabel="arrivals (queries/s)", ylim=(0, None))
    batch.set(ylabel="batch size", ylim=(0, None))
    accuracy.set(ylabel="subnet accuracy (%)")
    attainment.set(ylabel="SLO attainment (%)", xlabel="time (s)")
    for axes in (rate, batch, accuracy, attainment):
        axes.grid(alpha=0.3)
        for mark in marks_s:
            axes.axvline(mark, color="tab:red", linestyle=":", linewidth=1)
    fig.legend(loc="outside upper center", ncols=len(runs))
    _save(fig, path, dpi=110)


def latencies(
    values_ms: Sequence[Sequence[float]], shapes: Sequence[str], accuracies: Sequence[float], path: Path, *, title: str
) -> None:
    """A heat map of the latency of every subnet at every batch size (the paper's Figure 6).

    Args:
      values_ms: [subnets][shapes] latencies.
      shapes: names of the batch shapes, such as "16" or, with length buckets, "16 x 128".
      accuracies: [subnets] fractions, ascending.
      path: the PNG file.
      title: above the plot.
    """
    count = len(accuracies)
    fig = figure.Figure(figsize=(2 + 0.9 * len(shapes), 1.8 + 0.45 * min(count, 20)), layout="constrained")
    axes = fig.subplots()
    image = axes.imshow(values_ms, norm="log", cmap="viridis", aspect="auto", origin="lower")
    middle = math.sqrt(min(map(min, values_ms)) * max(map(max, values_ms)))
    if count <= 20:
        for i, of_subnet in enumerate(values_ms):
            for j, ms in enumerate(of_subnet):
                text = f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if ms < middle else "black")
    axes.set_xticks(range(len(shapes)), shapes)
    labelled = range(0, count, math.ceil(count / 20))
    axes.set_yticks(labelled, [f"{100 * accuracies[i]:.2f}" for i in labelled])
    label_x = "batch size x tokens" if "x" in shapes[0] else "batch size"
    axes.set(xlabel=label_x, ylabel="subnet, by its accuracy (%)", title=title)
    fig.colorbar(image, label="latency of a batch (ms)", ticks=ticker.LogLocator(subs=(1, 2, 5)), format="{x:g}")
    _save(fig, path, dpi=120)


def _save(fig: figure.Figure, path: Path, *, dpi: int) -> None:
    """Writes a PNG file atomically, and creates its folder."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=dpi, format="png")
    files.write_bytes(path, buffer.getvalue())
