"""Plots of a training run and of a search for subnets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from superserve_jax.plots.axes import Line, Panel, Path, panels


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
