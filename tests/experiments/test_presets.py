"""The presets: which cells they have, and the traffic and profiles in them."""

import dataclasses
import json

import pytest
from policy_cases import MAF_SAMPLE, PAPER

from superserve_jax import errors
from superserve_jax.experiments import presets
from superserve_jax.profile import Profile
from superserve_jax.scheduling import policies


def test_presets_are_those_of_the_evaluation_and_pure_data():
    known = "maf bursty acceleration policies worker_kills dynamics scale scale_batches actuation actuation_maf"
    assert list(presets.PRESETS) == [*known.split(), "capacity", "slowdown", "decisions"]
    for grids in presets.PRESETS.values():
        assert json.dumps([dataclasses.asdict(grid) for grid in grids])
        assert hash(grids) == hash(tuple(dataclasses.replace(grid) for grid in grids))


@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_every_cell_is_there_once_and_all_its_policies_can_be_made(preset):
    cells = list(presets.cells(preset, seeds=range(5)))
    assert len(set(cells)) == len(cells)
    for name in {name for cell in cells for name in cell.policies}:
        assert callable(policies.create(name, PAPER))


def test_the_papers_grids_are_complete():
    def count(preset):
        return len({c.trace for c in presets.cells(preset)})

    assert (count("bursty"), count("acceleration"), count("policies"), count("scale"), count("actuation")) == (9, 9, 3, 6, 9)
    bursty = {c.trace for c in presets.cells("bursty")}
    assert {"1500+2950 cv2=2", "1500+5550 cv2=8"} <= bursty
    [cluster] = {c.cluster for c in presets.cells("worker_kills")}
    assert [(o.worker, o.from_s) for o in cluster.outages] == [(0, 12.0), (1, 24.0), (2, 36.0), (3, 48.0)]
    assert {c.scale for c in presets.cells("bursty")} == {1.0, 1.9}


def test_clients_of_the_batch_preset_send_eight_queries_at_once():
    cell = next(presets.cells("scale_batches", duration_s=0.5))
    traffic = dataclasses.replace(cell.traffic, load=0.5)
    arrivals = traffic.create(0, capacity_qps=3200.0, duration_s=0.5).arrivals_s
    assert (len(arrivals), len(set(arrivals)), arrivals[-1]) == (800, 100, 0.5)
    assert {(c.cluster.workers, c.sustained) for c in presets.cells("scale_batches")} == {(2**i, True) for i in range(6)}


def test_figure_13_has_two_bursty_and_two_accelerating_traces():
    traces = list(dict.fromkeys(c.trace for c in presets.cells("dynamics")))
    assert traces == ["1500+5550 cv2=2", "1500+5550 cv2=8", "2500-7800 at 250", "2500-7800 at 5000"]


def test_actuation_delays_are_also_simulated_on_the_azure_trace():
    assert sorted(presets.AZURE) == ["actuation_maf", "maf"]
    cells = list(presets.cells("actuation_maf", scales=(1.0,)))
    assert [c.cluster.actuation_ms for c in cells] == [0.0, 1.0, 10.0, 100.0]
    assert {c.traffic for c in cells} == {presets.MAF}


def test_seeds_scales_and_policies_can_be_replaced():
    cells = list(presets.cells("slowdown", seeds=(3, 4), scales=(1.5,), policies=("slackfit", "fixed:all"), subnets=2))
    assert {c.scale for c in cells} == {1.5}
    assert {c.policies for c in cells} == {("slackfit", "fixed:0", "fixed:1")}
    assert len({(c.trace, c.seed) for c in cells}) == len(cells) == 4 * 2 + 2  # the stalls' traffic has no chance in it


@pytest.mark.parametrize(("seconds", "factor"), [(30.0, 0.5), (60.0, 1.0), (120.0, 2.0)])
def test_kills_and_stalls_move_with_the_length_of_the_traffic(seconds, factor):
    kills = next(presets.cells("worker_kills", duration_s=seconds)).cluster.outages
    assert [o.from_s for o in kills] == [12.0 * factor * (i + 1) for i in range(4)]
    [*_, cell] = presets.cells("slowdown", duration_s=seconds / 10)
    [stall] = cell.cluster.stalls
    assert (stall.from_s, stall.until_s - stall.from_s) == (pytest.approx(2.0 * factor), pytest.approx(0.2))


def test_a_length_that_is_too_short_for_the_acceleration_is_refused():
    slow = next(c for c in presets.cells("acceleration", duration_s=20.0) if c.trace == "2500-7800 at 250")
    with pytest.raises(errors.ConfigError, match=r"'2500-7800 at 250' ends its rise after 32 s.*at least 32, got 20"):
        presets.check_length(slow)
    for cell in (*presets.cells("acceleration"), *presets.cells("acceleration", duration_s=32.0), *presets.cells("bursty")):
        presets.check_length(cell)


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'bursty'"):
        list(presets.cells("burtsy"))


def test_a_dense_profile_lies_on_the_lines_of_the_given_one():
    two = Profile(PAPER.batch_sizes, PAPER.rows[:2])
    dense = presets.dense(two, 5)
    assert [r.accuracy for r in dense.rows] == pytest.approx([0.7382, 0.745375, 0.75255, 0.759725, 0.7669])
    middle = [(a + b) / 2 for a, b in zip(PAPER.rows[0].latency_ms, PAPER.rows[1].latency_ms, strict=True)]
    assert dense.rows[2].latency_ms == pytest.approx(middle)
    assert len(presets.dense(PAPER).rows) == 500


def test_the_azure_trace_asks_for_its_file_and_says_where_it_is_to_be_had():
    with pytest.raises(errors.DataError, match=r"AzurePublicDataset.*--maf-trace"):
        presets.MAF.create(0)
    trace = presets.MAF.create(0, duration_s=2.0, maf_trace=str(MAF_SAMPLE))
    assert (len(trace), trace.name) == (12_800, "MAF 6400")
