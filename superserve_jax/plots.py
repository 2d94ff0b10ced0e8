"""Plots of results, as PNG files. Matplotlib's object interface: no global figure, no display."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure

Path = str | os.PathLike[str]


def metrics(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The course of training: losses and the largest subnet's training accuracy over steps.

    Args:
      lines: the run's metrics, with "step", "loss", "loss_smallest" and "accuracy".
      path: of the PNG.
    """
    fig = figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = fig.subplots(1, 2)
    steps = [m["step"] for m in lines]
    left.plot(steps, [m["loss"] for m in lines], label="largest, against labels")
    left.plot(steps, [m["loss_smallest"] for m in lines], label="smallest, against the largest")
    left.set(xlabel="step", ylabel="loss")
    left.legend()
    right.plot(steps, [100 * m["accuracy"] for m in lines], label="largest")
    right.set(xlabel="step", ylabel="training accuracy (%)")
    right.legend()
    fig.savefig(path, dpi=120)


def search(
    cloud: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    served: Sequence[tuple[float, float]],
    path: Path,
) -> None:
    """The search's candidates, its Pareto front and the subnets chosen, each as (FLOPs, accuracy as a fraction)."""
    fig = figure.Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    axes.scatter(*_columns(cloud), s=12, color="0.6", label="candidates")
    axes.plot(*_columns(front), color="tab:blue", label="Pareto front")
    axes.scatter(*_columns(served), color="tab:orange", zorder=3, label="served")
    axes.set(xscale="log", xlabel="multiply-adds per image", ylabel="validation accuracy (%)")
    axes.legend()
    fig.savefig(path, dpi=120)


def replay(runs: Mapping[str, Any], path: Path) -> None:
    """Traffic over time, one line per policy: arrival rate, batch size, subnet accuracy, SLO attainment.

    Args:
      runs: `serving.metrics.Series` by policy, all of the same trace.
      path: of the PNG.
    """
    fig = figure.Figure(figsize=(10, 8), layout="constrained")
    panels = fig.subplots(4, 1, sharex=True)
    first = next(iter(runs.values()))
    panels[0].plot(first.time_s, first.rate_qps, color="0.3", drawstyle="steps-mid")
    for name, run in runs.items():
        panels[1].plot(run.time_s, run.batch, label=name)
        panels[2].plot(run.time_s, 100 * run.accuracy, label=name)
        panels[3].plot(run.time_s, 100 * run.attainment, label=name)
    labels = ("arrivals (queries/s)", "batch size", "subnet accuracy (%)", "SLO attainment (%)")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[2].legend(loc="lower right", ncols=len(runs))
    panels[3].set_xlabel("time (s)")
    fig.savefig(path, dpi=110)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [p[0] for p in points], [100 * p[1] for p in points]
