"""Plots: what is drawn."""

import numpy as np
import pytest
from matplotlib import figure

from superserve_jax import plots
from superserve_jax.plots import Line, Panel, Timeline
from superserve_jax.simulation.metrics import Series


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """The figures that were saved. The files are empty."""
    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda fig, file, **options: figures.append(fig))
    monkeypatch.chdir(tmp_path)
    return figures


def run(rates, attainment=1.0):
    rates = np.array(rates, float)
    same = np.ones_like(rates)
    return Series(np.arange(len(rates)) + 0.5, rates, attainment * same, 0.75 * same, 4 * same, 20 * same)


def test_a_timeline_has_a_title_shaded_bursts_and_attainment_up_to_100(saved):
    rates = [1000, 1000, 5000, 5000, 1000]
    columns = [
        Timeline({"slackfit": run(rates), "max-acc": run(rates, 0.5)}, "a trace", marks_s=[3.0]),
        Timeline({"x": run([1])}),
    ]
    plots.timelines(columns, "unused.png", title="Figure", note="ours")
    [fig] = saved
    rate, _, _, attainment = (fig.axes[2 * row] for row in range(4))
    assert fig.get_suptitle() == "Figure"
    assert rate.get_title() == "a trace"
    assert attainment.get_ylim()[1] == 100
    [burst] = rate.patches
    assert (burst.get_x(), burst.get_width()) == (2.0, 2.0)
    [legend] = fig.legends
    assert legend.get_title().get_text() == "ours"
    assert [text.get_text() for text in legend.get_texts()][:2] == ["slackfit", "max-acc"]


def test_a_replay_shows_latencies_below_a_line_at_the_slo(saved):
    plots.replay({"slackfit": run([1000, 5000, 1000])}, "unused.png", slo_ms=36.0, title="one server")
    [fig] = saved
    _, latency, *_ = fig.axes
    own, slo = latency.lines
    assert own.get_ydata().tolist() == [20.0, 20.0, 20.0]
    assert slo.get_ydata() == [36.0, 36.0]
    assert (len(fig.axes), latency.get_ylabel(), latency.get_yscale()) == (5, "p99 latency (ms)", "log")
    assert "SLO, 36 ms" in [text.get_text() for text in fig.legends[0].get_texts()]


def test_a_panel_ends_where_it_should_and_shows_its_level(saved):
    line = Line([1, 2], [99.0, 100.0])
    plots.panels([Panel("t", "x", "y", {"a": line}, most_y=100, level=(99.9, "the goal"))], "unused.png", title="T", note="n")
    [axes] = saved[0].axes
    assert axes.get_ylim()[1] == 100
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["a", "the goal"]


def test_latencies_above_the_slo_are_crossed_out(saved):
    plots.latencies([[1.0, 2.0], [3.0, 50.0]], ["1", "2"], [0.7, 0.8], "unused.png", title="T", slo_ms=36)
    heat, scale = saved[0].axes
    [crossed] = heat.lines
    assert crossed.get_xdata().tolist() == [0.5, 1.5]
    assert "SLO of 36 ms" in scale.get_title()


def test_the_legend_of_a_search_is_inside_the_figure(saved):
    points = [(10.0 * k, 0.5 + 0.02 * k) for k in range(1, 9)]
    plots.search(points, points, points, "unused.png", cost="MFLOPs per input", error=0.02, title="Search of pets")
    [fig] = saved
    fig.draw_without_rendering()
    [legend] = fig.legends
    box, whole = legend.get_window_extent(), fig.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert [text.get_text() for text in legend.get_texts()][2] == "chosen to serve (8), with standard error"


def test_the_legend_of_a_replay_is_inside_the_figure(saved):
    labels = ["slackfit (default)", "slackfit-paper (the paper's rule)", "fixed:3, 91.21 %", "fixed:4, 94.37 %", "my_policy"]
    runs = {label: run([1000, 1000, 5000, 1000]) for label in labels}
    plots.replay(runs, "unused.png", slo_ms=36.0, title="one server", note="measured on cpu")
    [fig] = saved
    fig.draw_without_rendering()
    box = fig.legends[0].get_window_extent()
    assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1
    assert len(fig.legends[0].get_texts()) == len(labels) + 2  # the SLO and the bursts


def test_a_single_point_is_hollow_and_above_the_lines(saved):
    lines = {"policy": Line([2.0], [100.0], [0.0]), "fixed models": Line([1.0, 2.0], [100.0, 100.0], style="s--")}
    plots.panels([Panel("t", "x", "y", lines)], "unused.png")
    point, fixed = saved[0].axes[0].containers
    assert point.lines[0].get_markerfacecolor() == "none"
    assert point.lines[0].get_zorder() > fixed.lines[0].get_zorder()
    assert not point.has_yerr  # a spread of 0 is not drawn


def test_steady_traffic_has_no_bursts():
    assert plots.bursts([0.5, 1.5], [7.0, 7.0]) == []
