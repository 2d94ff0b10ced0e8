"""Heat maps: latency and FLOPs of every subnet at every batch size."""

import math
from collections.abc import Sequence

from matplotlib import colors, figure

from superserve_jax.plots.axes import Path, frame, plain_numbers, save


def latencies(
    values_ms: Sequence[Sequence[float]],
    shapes: Sequence[str],
    accuracies: Sequence[float],
    path: Path,
    *,
    title: str,
    note: str = "",
    slo_ms: float | None = None,
) -> None:
    """A heat map of the latency of every subnet at every batch size (the paper's Figure 6).

    Args:
      values_ms: [subnets][shapes] latencies.
      shapes: names of the batch shapes, such as "16" or, with length buckets, "16 x 128".
      accuracies: [subnets] fractions, ascending.
      path: the PNG file.
      title: above the plot.
      note: small text below the plot.
      slo_ms: an SLO, marked in the scale of colours. Latencies above it are crossed out.
    """
    label = "latency of a batch (ms)"
    _heat_map(values_ms, shapes, accuracies, path, label=label, title=title, note=note, limit=slo_ms)


def flops(
    values: Sequence[Sequence[float]],
    shapes: Sequence[str],
    accuracies: Sequence[float],
    path: Path,
    *,
    title: str,
    note: str = "",
    unit: str = "GFLOPs",
) -> None:
    """A heat map of the FLOPs of every subnet at every batch size (the paper's Figure 12). See `latencies`."""
    _heat_map(values, shapes, accuracies, path, label=f"{unit} of a batch", title=title, note=note)


def _heat_map(
    values: Sequence[Sequence[float]],
    shapes: Sequence[str],
    accuracies: Sequence[float],
    path: Path,
    *,
    label: str,
    title: str,
    note: str,
    limit: float | None = None,
) -> None:
    count = len(accuracies)
    fig = figure.Figure(figsize=(max(2 + 0.9 * len(shapes), 6.5), 1.8 + 0.45 * min(count, 20)), layout="constrained")
    axes = fig.subplots()
    low, high = min(map(min, values)), max(max(map(max, values)), limit or 0)
    image = axes.imshow(values, norm=colors.LogNorm(low, high), cmap="viridis", aspect="auto", origin="lower")
    middle = math.sqrt(low * high)
    for i, of_subnet in enumerate(values):
        for j, value in enumerate(of_subnet):
            color = "white" if value < middle else "black"
            if count <= 20:
                text = f"{value:#.3g}" if value < 100 else f"{value:.0f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
            if limit is not None and value > limit:
                axes.plot([j - 0.5, j + 0.5], [i - 0.5, i + 0.5], color="tab:red", linewidth=1)
    axes.set_xticks(range(len(shapes)), shapes)
    labelled = range(0, count, math.ceil(count / 20))
    axes.set_yticks(labelled, [f"{100 * accuracies[i]:.2f}" for i in labelled])
    label_x = "batch size x tokens" if "x" in shapes[0] else "batch size"
    axes.set(xlabel=label_x, ylabel="subnet, by its accuracy (%)")
    bar = fig.colorbar(image, label=label)
    plain_numbers(bar.ax.yaxis)
    if limit is not None:
        bar.ax.axhline(limit, color="tab:red", linewidth=2)
        bar.ax.set_title(f"red: SLO of {limit:g} ms", fontsize=8, color="tab:red")
    frame(fig, title, note)
    save(fig, path, dpi=120)
