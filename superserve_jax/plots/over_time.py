"""Plots of traffic over time, from the series of `simulation.metrics`."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure

from superserve_jax.plots.axes import Path, frame, save


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The runs of some policies on one trace, over time. It is one column of plots.

    Args:
      runs: a `simulation.metrics.Series` for each policy.
      title: above the column.
      marks_s: times to mark, such as the loss of a worker.
    """

    runs: Mapping[str, Any]
    title: str = ""
    marks_s: Sequence[float] = ()


_ABOVE_MEDIAN = 1.5
_BURST = f"burst: more than {_ABOVE_MEDIAN} times the median rate"


def timelines(columns: Sequence[Timeline], path: Path, *, title: str = "", note: str = "") -> None:
    """Plots traffic over time, one column per trace, with one line per policy.

    The rows are arrival rate, batch size, subnet accuracy and SLO attainment. Bursts are shaded (see `bursts`).

    Args:
      columns: the columns.
      path: the PNG file.
      title: above the plot.
      note: small text below the plot.
    """
    count = len(columns)
    fig = figure.Figure(figsize=(10 if count == 1 else 5.2 * count, 8.5), layout="constrained")
    grid = fig.subplots(4, count, sharex="col", sharey="row", squeeze=False)
    labels = list(dict.fromkeys(name for column in columns for name in column.runs))
    handles: dict[str, Any] = {}
    for (rate, batch, accuracy, attainment), column in zip(grid.T, columns, strict=True):
        first = next(iter(column.runs.values()))
        rate.plot(first.time_s, first.rate_qps, color="0.3", drawstyle="steps-mid", linewidth=1)
        for name, run in column.runs.items():
            look = {"color": f"C{labels.index(name) % 10}", "linewidth": 1.2}
            handles[name] = batch.plot(run.time_s, run.batch, **look)[0]
            accuracy.plot(run.time_s, 100 * run.accuracy, **look)
            attainment.plot(run.time_s, 100 * run.attainment, **look, clip_on=False)  # all of a line at 100 shows
        rate.set_title(column.title, fontsize=10)
        attainment.set(xlabel="time (s)")
        for axes in (rate, batch, accuracy, attainment):
            axes.grid(alpha=0.3)
            for start_s, end_s in bursts(first.time_s, first.rate_qps):
                handles[_BURST] = axes.axvspan(start_s, end_s, color="tab:orange", alpha=0.2, linewidth=0)
            for mark in column.marks_s:
                handles["worker lost"] = axes.axvline(mark, color="tab:red", linestyle=":", linewidth=1.2)
    rate, batch, accuracy, attainment = grid[:, 0]
    rate.set(ylabel="arrivals (queries/s)", ylim=(0, None))
    batch.set(ylabel="batch size", ylim=(0, None))
    accuracy.set(ylabel="subnet accuracy (%)", ylim=(None, min(100.0, accuracy.get_ylim()[1])))
    attainment.set(ylabel="SLO attainment (%)", ylim=(None, 100))
    frame(fig, title, note, handles)
    save(fig, path, dpi=110)


def bursts(time_s: Sequence[float], rate_qps: Sequence[float]) -> list[tuple[float, float]]:
    """Start and end of the bursts: the windows in which the rate is more than 1.5 times its median.

    Args:
      time_s: [windows] the middle of each window, at equal distances.
      rate_qps: [windows] the arrival rate in each window.

    >>> bursts([0.5, 1.5, 2.5, 3.5, 4.5], [10.0, 90.0, 100.0, 10.0, 10.0])
    [(1.0, 3.0)]
    """
    if len(time_s) < 2:
        return []
    half_s = (time_s[1] - time_s[0]) / 2
    level = _ABOVE_MEDIAN * statistics.median(rate_qps)
    found: list[tuple[float, float]] = []
    for t, rate in zip(time_s, rate_qps, strict=True):
        if rate > level:
            start_s = found.pop()[0] if found and found[-1][1] > t - 1.5 * half_s else t - half_s
            found.append((float(start_s), float(t + half_s)))
    return found


def replay(runs: Mapping[str, Any], path: Path, *, marks_s: Sequence[float] = (), title: str = "", note: str = "") -> None:
    """Plots the runs of some policies on one trace over time; see `Timeline` and `timelines`."""
    timelines([Timeline(runs, "", marks_s)], path, title=title, note=note)
