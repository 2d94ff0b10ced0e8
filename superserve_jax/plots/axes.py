"""Pairs of axes with lines and points: the base of most plots. No global figure, no display."""

import dataclasses
import io
import math
import os
import textwrap
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
      level: a horizontal line at this y, such as an SLO, and its label.
    """

    title: str
    label_x: str
    label_y: str
    lines: Mapping[str, Line]
    scale_x: Literal["linear", "log", "log2", "symlog"] = "linear"
    scale_y: Literal["linear", "log"] = "linear"
    most_y: float | None = None
    level: tuple[float, str] | None = None


def panels(
    shown: Sequence[Panel], path: Path, *, columns: int = 3, title: str = "", note: str = "", own_legends: bool = False
) -> None:
    """Draws panels in `columns` columns.

    Args:
      shown: the panels, row by row.
      path: the PNG file.
      columns: the largest number of columns.
      title: above all panels.
      note: small text below all panels, such as where the data come from.
      own_legends: whether each panel has a legend of its own, instead of one legend below all.
    """
    columns = min(columns, len(shown))
    count = math.ceil(len(shown) / columns)
    fig = figure.Figure(figsize=(max(4.2 * columns, 6), 3.2 * count + 0.8), layout="constrained")
    grid = fig.subplots(count, columns, squeeze=False)
    labels = list(dict.fromkeys(label for panel in shown for label in panel.lines))
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, shown, strict=False):
        for label, line in panel.lines.items():
            color = line.color or f"C{labels.index(label) % 10}"
            looks = {"fmt": line.style, "color": color, "linewidth": 1.4, "capsize": 2}
            if len(line.x) == 1:  # a hollow point above the lines: it is visible, and so are points beneath it
                looks |= {"markersize": 8, "markerfacecolor": "none", "zorder": 4}
            else:
                looks |= {"markersize": 6, "markerfacecolor": color, "zorder": 3}
            looks["clip_on"] = panel.most_y is None  # points at the end of the axis stay whole
            spreads = (spread if spread and any(spread) else None for spread in (line.spread, line.spread_x))
            handles[label] = axes.errorbar(line.x, line.y, *spreads, **looks)
        if panel.level:
            handles[panel.level[1]] = axes.axhline(panel.level[0], color="tab:red", linestyle=":", linewidth=1.4)
        axes.set(xlabel=panel.label_x, ylabel=panel.label_y, yscale=panel.scale_y)
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.3)
        if own_legends:
            axes.legend([handles[label] for label in panel.lines], panel.lines.keys(), fontsize=9)
        _scale_x(axes, panel)
        if panel.scale_y == "log":
            plain_numbers(axes.yaxis)
        elif axes.get_ylim()[1] >= 10_000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        if panel.most_y is not None and axes.get_ylim()[1] > panel.most_y:
            axes.set_ylim(top=panel.most_y)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    frame(fig, title, note, {} if own_legends else handles)
    save(fig, path, dpi=110)


def frame(fig: figure.Figure, title: str, note: str, handles: Mapping[str, Any] | None = None) -> None:
    """Writes a title above a figure, and a note and a legend below it."""
    width = fig.get_figwidth()
    if title:
        fig.suptitle(_wrapped(title, int(10 * width)))
    note = _wrapped(note, int(13 * width))
    if handles:
        label_in = max(1.8, 0.6 + 0.08 * max(map(len, handles)))  # with its marker; a letter is about 0.08 inches wide
        columns = max(min(len(handles), int(width // label_in)), 1)
        looks = {"title": note, "title_fontsize": 8, "frameon": False}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, **looks)
    elif note:
        fig.supxlabel(note, fontsize=8)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


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
            plain_numbers(axes.xaxis)


def plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with 1, 2, 5, 10, 20 instead of powers of ten."""
    locator, minor = ticker.LogLocator(subs=(1, 2, 5)), ticker.NullFormatter()
    axis.set(major_locator=locator, major_formatter="{x:g}", minor_formatter=minor)


def save(fig: figure.Figure, path: Path, *, dpi: int) -> None:
    """Writes a PNG file atomically, and creates its folder."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=dpi, format="png")
    files.write_bytes(path, buffer.getvalue())
