"""Running cells: their results, and how they are determined."""

import dataclasses
import json

import pytest
from policy_cases import MAF_SAMPLE, PAPER

from superserve_jax import errors
from superserve_jax.experiments import paper_table, presets, runner
from superserve_jax.scheduling import policies
from superserve_jax.simulation import simulator
from superserve_jax.simulation.cluster import Cluster, Outage

KEYS = {"preset", "trace", "scale", "policy", "seed", "attainment", "accuracy", "fluid_accuracy"}


def short(preset, *, seconds=0.3, **options):
    return list(presets.cells(preset, duration_s=seconds, **options))


def test_a_result_holds_what_the_simulator_says_under_the_documented_names():
    cell = short("policies", scales=(1.9,), seeds=(2,))[0]
    results = runner.run_cell(cell, PAPER)
    assert [r["policy"] for r in results] == list(cell.policies)
    trace = runner.make_trace(cell, PAPER.scaled(1.9))
    expected = simulator.simulate(PAPER.scaled(1.9), "slackfit", trace)
    assert results[0]["attainment"] == expected.attainment
    assert results[0]["accuracy"] == pytest.approx(100 * expected.mean_accuracy)
    for result in results:
        assert set(result) >= KEYS
        assert (result["preset"], result["scale"], result["seed"], result["queries"]) == ("policies", 1.9, 2, len(trace))
        assert 0 <= result["attainment"] <= 1
        assert 73 < result["accuracy"] < 81
        assert 73 < result["fluid_accuracy"] < 81
        assert result["last_miss_s"] is result["decision_p50_us"] is None
        for part in json.dumps(result).split():
            assert "NaN" not in part


def test_a_policy_that_meets_no_deadline_has_no_accuracy():
    cell = dataclasses.replace(short("bursty", scales=(100.0,))[0], policies=("fixed:0",))
    [result] = runner.run_cell(cell, PAPER)
    assert (result["attainment"], result["accuracy"], result["accuracy_first"]) == (0.0, None, None)


def test_results_are_determined_by_the_seed_and_the_same_in_parallel():
    cells = [*short("bursty", scales=(1.9,), seeds=(0, 1), policies=("slackfit", "fixed:1"))[:4], short("scale")[0]]
    serial, again = (runner.evaluate(cells, PAPER) for _ in range(2))
    assert serial == again
    assert [r["seed"] for r in serial[:6:2]] == [0, 1, 0]
    assert serial[0]["queries"] != serial[2]["queries"] or serial[0]["attainment"] != serial[2]["attainment"]
    assert runner.evaluate(cells, PAPER, jobs=2) == serial


def test_an_error_in_a_process_reaches_the_caller():
    cells = [dataclasses.replace(c, policies=("slakfit",)) for c in short("bursty")[:3]]
    with pytest.raises(errors.UnknownNameError, match="did you mean 'slackfit'"):
        runner.evaluate(cells, PAPER, jobs=2)


def test_the_sustained_rate_of_a_fixed_model_is_its_throughput():
    cells = [c for c in short("capacity", seconds=2.0, scales=(1.0,)) if c.sustained]
    [fastest, second, *_] = runner.run_cell(dataclasses.replace(cells[0], policies=("fixed:0", "fixed:1")), PAPER)
    for result, subnet in ((fastest, PAPER.rows[0].subnet), (second, PAPER.rows[1].subnet)):
        assert result["rate_qps"] == pytest.approx(8 * PAPER.throughput_qps(subnet), rel=0.02)
        assert result["attainment"] >= runner.SUSTAINED


def test_a_delay_for_each_change_of_the_subnet_costs_deadlines_on_the_azure_trace():
    cells = short("actuation_maf", seconds=1.0, scales=(1.0,), policies=("slackfit",))
    results = [result for cell in cells for result in runner.run_cell(cell, PAPER, str(MAF_SAMPLE))]
    assert [r["actuation_ms"] for r in results] == [0.0, 1.0, 10.0, 100.0]
    assert results[0]["attainment"] > results[-1]["attainment"] + 0.1


def test_figure_13s_traces_and_clients_that_send_batches_are_in_the_papers_table():
    cells = [
        *short("dynamics", scales=(1.0,)),
        *short("scale_batches", seconds=0.5, scales=(1.0,), policies=("slackfit",))[:2],
    ]
    found = {line.what: line.ours for line in paper_table.compare(runner.evaluate(cells, PAPER))}
    assert found["1500+5550 cv2=8: attainment"] == "1.0000"
    assert found["2500-7800 at 250: attainment"] == "1.0000"
    assert found["queries/s per worker, relative to 1 worker(s)"].startswith(("0.9", "1.0"))


def test_misses_after_a_stall_are_timed_from_its_end():
    cell = short("slowdown", seconds=4.0, policies=("slackfit", "least-accurate"))[-1]
    assert cell.trace == "steady, 80 % load, stall of 200 ms"
    guarded, least = runner.run_cell(cell, PAPER)
    assert 0 < guarded["last_miss_s"] < 1.0 < least["last_miss_s"]


def test_the_bound_of_a_cluster_that_shrinks_lies_between_those_of_its_ends():
    cluster = Cluster(workers=8, outages=tuple(Outage(i, 2.0) for i in range(4)))
    cell = dataclasses.replace(short("worker_kills", seconds=4.0, scales=(1.9,))[0], cluster=cluster, policies=("slackfit",))
    [result], [whole], [half] = (
        runner.run_cell(dataclasses.replace(cell, cluster=c), PAPER) for c in (cluster, Cluster(workers=8), Cluster(workers=4))
    )
    assert result["fluid_accuracy"] == pytest.approx((whole["fluid_accuracy"] + half["fluid_accuracy"]) / 2, abs=0.2)
    assert result["accuracy_first"] > result["accuracy_last"] + 1


def test_decisions_are_timed_on_a_dense_profile():
    cell = dataclasses.replace(short("decisions", scales=(1.0,))[0], policies=("slackfit", "proteus"))
    for result in runner.evaluate([cell], PAPER):
        assert 0 < result["decision_p50_us"] <= result["decision_p99_us"]


def test_a_number_of_latency_buckets_is_part_of_the_name():
    cell = dataclasses.replace(short("bursty")[-1], policies=("slackfit-paper", "slackfit-paper:8", "slackfit-paper:64"))
    default, eight, many = ({**r, "policy": ""} for r in runner.run_cell(cell, PAPER))
    assert default == eight != many
    with pytest.raises(errors.UnknownNameError, match="slackfit-paper:<n>"):
        policies.create("slackfit-paper:many", PAPER)


@pytest.mark.slow
def test_on_the_sample_of_maf_the_gains_over_fixed_models_are_above_the_papers():
    cell = next(iter(presets.cells("maf", scales=(1.0,), policies=("slackfit", "fixed:all"))))
    results = runner.run_cell(cell, PAPER, str(MAF_SAMPLE))
    found = {f.what: f for f in paper_table.compare(results)}
    assert float(found["accuracy at equal attainment"].ours.split()[0]) > 4.67
    assert float(found["attainment at equal accuracy"].ours.split("x")[0]) > 2.85
