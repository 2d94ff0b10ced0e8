"""Plots of traffic over time, from the series of `simulation.metrics`."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure

from superserve_jax.plots.axes import Path, frame, plain_numbers, save


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The runs of some policies on one trace, over time. It is one column of plots.

    Args:
      runs: a `simulation.metrics.Series` for each policy.
      title: above the column.
      marks_s: times to mark, such as the loss of a worker.
      slo_ms: the SLO. If it is given, a row shows the latencies and the SLO.
      bursts_s: start and end of each burst; None finds them with `bursts`.
    """

    runs: Mapping[str, Any]
    title: str = ""
    marks_s: Sequence[float] = ()
    slo_ms: float | None = None
    bursts_s: Sequence[tuple[float, float]] | None = None


_ABOVE_MEDIAN = 1.5
_BURST = f"burst: over {_ABOVE_MEDIAN} x median rate"


def timelines(columns: Sequence[Timeline], path: Path, *, title: str = "", note: str = "") -> None:
    """Plots traffic over time, one column per trace, with one line per policy.

    The rows are arrival rate, latency (if an SLO is given), batch size, subnet accuracy and SLO attainment. Bursts are shaded
    (see `bursts`).

    Args:
      columns: the columns.
      path: the PNG file.
      title: above the plot.
      note: small text below the plot.
    """
    count = len(columns)
    names = ["rate", *(["latency"] if any(c.slo_ms is not None for c in columns) else []), "batch", "accuracy", "attainment"]
    fig = figure.Figure(figsize=(10 if count == 1 else 5.2 * count, 0.5 + 2 * len(names)), layout="constrained")
    grid = dict(zip(names, fig.subplots(len(names), count, sharex="col", sharey="row", squeeze=False), strict=True))
    labels = list(dict.fromkeys(name for column in columns for name in column.runs))
    handles: dict[str, Any] = {}
    for i, column in enumerate(columns):
        first, axes_of = next(iter(column.runs.values())), {name: row[i] for name, row in grid.items()}
        axes_of["rate"].plot(first.time_s, first.rate_qps, color="0.3", drawstyle="steps-mid", linewidth=1)
        for name, run in column.runs.items():
            look = {"color": f"C{labels.index(name) % 10}", "linewidth": 1.2}
            handles[name] = axes_of["batch"].plot(run.time_s, run.batch, **look)[0]
            axes_of["accuracy"].plot(run.time_s, 100 * run.accuracy, **look)
            axes_of["attainment"].plot(run.time_s, 100 * run.attainment, **look, clip_on=False)  # a line at 100 shows
            if "latency" in axes_of:
                axes_of["latency"].plot(run.time_s, run.p99_ms, **look)
        if column.slo_ms is not None:
            slo = axes_of["latency"].axhline(column.slo_ms, color="black", linestyle="--", linewidth=1.2)
            handles[f"SLO, {column.slo_ms:.0f} ms"] = slo
        axes_of["rate"].set_title(column.title, fontsize=10)
        axes_of["attainment"].set(xlabel="time (s)")
        for axes in axes_of.values():
            axes.grid(alpha=0.3)
            found = bursts(first.time_s, first.rate_qps) if column.bursts_s is None else column.bursts_s
            for start_s, end_s in found:
                handles[_BURST if column.bursts_s is None else "burst"] = axes.axvspan(
                    start_s, end_s, color="tab:orange", alpha=0.2, linewidth=0
                )
            for mark in column.marks_s:
                handles["worker lost"] = axes.axvline(mark, color="tab:red", linestyle=":", linewidth=1.2)
    left = {name: row[0] for name, row in grid.items()}
    left["rate"].set(ylabel="arrivals (queries/s)", ylim=(0, None))
    left["batch"].set(ylabel="batch size", ylim=(0, None))
    left["accuracy"].set(ylabel="subnet accuracy (%)", ylim=(None, min(100.0, left["accuracy"].get_ylim()[1])))
    left["attainment"].set(ylabel="SLO attainment (%)", ylim=(None, 100))
    if "latency" in left:
        left["latency"].set(ylabel="p99 latency (ms)", yscale="log")
        plain_numbers(left["latency"].yaxis)
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


def replay(
    runs: Mapping[str, Any],
    path: Path,
    *,
    marks_s: Sequence[float] = (),
    slo_ms: float | None = None,
    bursts_s: Sequence[tuple[float, float]] | None = None,
    title: str = "",
    note: str = "",
) -> None:
    """Plots the runs of some policies on one trace over time; see `Timeline` and `timelines`."""
    timelines([Timeline(runs, "", marks_s, slo_ms, bursts_s)], path, title=title, note=note)
