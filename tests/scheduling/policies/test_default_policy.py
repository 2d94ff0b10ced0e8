"""The default policy in the paper's traffic, and the order of the paper's policies."""

import functools

import pytest

from superserve_jax.experiments import presets, runner
from superserve_jax.simulation import paper_profile

PAPER = paper_profile.paper_profile()
OURS, LEAST = "slackfit", "fixed:0"
pytestmark = pytest.mark.slow


@functools.cache
def served(preset, scale):
    """For each traffic by name: the result rows of the default policy and of the least accurate model."""
    duration_s = 40.0 if preset == "bursty" else 20.0  # the rates stop changing within 20 s
    cells = list(presets.cells(preset, scales=(scale,), policies=(OURS, LEAST), duration_s=duration_s))
    assert len(cells) == 9
    return {cell.trace: runner.run_cell(cell, PAPER) for cell in cells}


@pytest.mark.parametrize("scale", [1.0, 1.9])
@pytest.mark.parametrize("preset", ["bursty", "acceleration"])
def test_the_default_policy_attains_what_the_least_accurate_model_does(preset, scale):
    for trace, (ours, least) in served(preset, scale).items():
        assert ours["attainment"] >= least["attainment"] - 0.001, trace
        assert ours["accuracy"] > least["accuracy"] + 1.0, trace


@pytest.mark.parametrize("scale", [1.0, 1.9])
def test_in_bursty_traffic_the_default_policy_is_near_the_fluid_bound(scale):
    for trace, (ours, _) in served("bursty", scale).items():
        gap = 0.3 if ours["rate_qps"] >= 6000 else 0.7
        assert 0 < ours["fluid_accuracy"] - ours["accuracy"] < gap, trace


def test_on_the_papers_latencies_bursty_traffic_is_served_at_three_nines_and_four_points_above_the_least_accurate():
    for trace, (ours, least) in served("bursty", 1.0).items():
        assert ours["attainment"] > 0.999, trace
        assert ours["accuracy"] >= least["accuracy"] + 4.33, trace


def test_in_the_hardest_traffic_the_papers_slackfit_beats_max_batch_and_max_acc_collapses():
    names = ("slackfit-paper", "max-batch", "max-acc")
    cells = presets.cells("policies", scales=(1.9,), policies=names, duration_s=20.0)
    [hardest] = [cell for cell in cells if cell.traffic == presets.HARDEST]
    slackfit, max_batch, max_acc = (row["attainment"] for row in runner.run_cell(hardest, PAPER))
    assert slackfit > max_batch + 0.05
    assert max_acc < 0.2
