"""Plots of results, as PNG files. They use matplotlib's object interface: no global figure, no display.

`axes` draws lines and points, `training` draws a run and a search, `over_time` draws traffic over time, and `heat_maps`
draws latency and FLOPs by subnet and batch size.
"""

from superserve_jax.plots.axes import Line, Panel, panels
from superserve_jax.plots.heat_maps import flops, latencies
from superserve_jax.plots.over_time import Timeline, bursts, replay, timelines
from superserve_jax.plots.training import metrics, search

__all__ = ["Line", "Panel", "Timeline", "bursts", "flops", "latencies", "metrics", "panels", "replay", "search", "timelines"]
