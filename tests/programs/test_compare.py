"""The presets of serve/compare.py, how their cells are run, and the program."""

import dataclasses
import json
import math
import pathlib
import runpy
import subprocess
import sys

import pytest

from superserve_jax import errors
from superserve_jax.experiments import figures, paper_table, presets, runner
from superserve_jax.profile import Profile
from superserve_jax.scheduling import policies
from superserve_jax.simulation import paper_profile, simulator
from superserve_jax.simulation.simulator import Cluster, Outage

ROOT = pathlib.Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "maf2019_100fn.csv"
PAPER = paper_profile.paper_profile()
FIGURES = {"attainment", "accuracy", "fluid_accuracy"}
NAMED = {"preset", "trace", "scale", "policy", "seed"}


def short(preset, *, seconds=0.3, **options):
    return list(presets.cells(preset, duration_s=seconds, **options))


@pytest.fixture
def day(tmp_path):
    """A day of two functions with a peak, in the layout of Azure Functions 2019."""
    path = tmp_path / "day.csv"
    minutes = range(1, 1441)
    counts = [10 + 30 * (700 < m < 720) for m in minutes]
    head = ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, minutes)])
    path.write_text("\n".join([head, *(",".join(["o", "a", f, "http", *map(str, counts)]) for f in "xy")]) + "\n")
    return path


# -- presets ------------------------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_evaluation_and_pure_data():
    known = {
        "maf",
        "bursty",
        "acceleration",
        "policies",
        "worker_kills",
        "scale",
        "actuation",
        "capacity",
        "slowdown",
        "decisions",
    }
    assert set(presets.PRESETS) == known
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


def test_seeds_scales_and_policies_can_be_replaced():
    cells = short("slowdown", seeds=(3, 4), scales=(1.5,), policies=("slackfit", "fixed:all"), subnets=2)
    assert {c.scale for c in cells} == {1.5}
    assert {c.policies for c in cells} == {("slackfit", "fixed:0", "fixed:1")}
    assert len({(c.trace, c.seed) for c in cells}) == len(cells) == 4 * 2 + 2  # the stalls' traffic has no chance in it


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


def test_the_azure_trace_asks_for_its_file_and_says_where_it_is_to_be_had(day):
    with pytest.raises(errors.DataError, match=r"AzurePublicDataset.*--maf-trace"):
        presets.MAF.create(0)
    trace = presets.MAF.create(0, duration_s=2.0, maf_trace=str(day))
    assert (len(trace), trace.name) == (12_800, "MAF 6400")


# -- running them -------------------------------------------------------------------------------------------------------------


def test_a_result_holds_what_the_simulator_says_under_the_documented_names():
    cell = short("policies", scales=(1.9,), seeds=(2,))[0]
    results = runner.run_cell(cell, PAPER)
    assert [r["policy"] for r in results] == list(cell.policies)
    trace = runner.make_trace(cell, PAPER.scaled(1.9))
    expected = simulator.simulate(PAPER.scaled(1.9), "slackfit", trace)
    assert results[0]["attainment"] == expected.attainment
    assert results[0]["accuracy"] == pytest.approx(100 * expected.mean_accuracy)
    for result in results:
        assert set(result) >= NAMED | FIGURES
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
    results = runner.run_cell(cell, PAPER, str(SAMPLE))
    found = {f.what: f for f in paper_table.compare(results)}
    assert float(found["accuracy at equal attainment"].ours.split()[0]) > 4.67
    assert float(found["attainment at equal accuracy"].ours.split("x")[0]) > 2.85


# -- figures and the program --------------------------------------------------------------------------------------------------


def test_every_preset_with_a_figure_draws_it(tmp_path, day):
    cells = [
        dataclasses.replace(c, policies=c.policies[:1] + c.policies[-2:])
        for preset in ("bursty", "worker_kills", "actuation", "scale", "slowdown", "capacity", "maf")
        for c in short(preset, seconds=0.1, scales=(1.9,))[:6]
        if c.cluster.workers < 16
    ]
    results = runner.evaluate(cells, PAPER, maf_trace=str(day))
    drawn = [*figures.draw(results, tmp_path), *figures.draw_over_time(cells, PAPER, tmp_path, maf_trace=str(day))]
    names = {path.name for path in drawn}
    assert {"bursty_x1.9.png", "maf_x1.9.png", "worker_kills_over_time_x1.9.png", "actuation.png", "capacity.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_program_prints_a_table_and_the_papers_figures_and_writes_the_results(run_program, tmp_path):
    PAPER.save(tmp_path / "profile.json")
    options = ("--preset", "policies", "--seeds", 2, "--seconds", 0.3, "--jobs", 1, "--paper")
    files = ("--profile", tmp_path / "profile.json", "--plots", tmp_path / "plots")
    printed, _, results = run_program("serve/compare.py", *options, *files, json_file=True)
    assert {r["seed"] for r in results} == {0, 1}
    assert {r["scale"] for r in results} == {1.0}  # the presets' 1.9 belongs to the reconstructed profile
    assert all(set(r) >= NAMED | FIGURES and not math.isnan(r["attainment"]) for r in results)
    assert "1500+5550 cv2=8" in printed
    assert "up to 0.05 less at cv2=8" in printed
    assert (tmp_path / "plots" / "policies_x1.png").exists()


def test_without_the_azure_file_all_presets_but_that_one_run(capsys):
    program = runpy.run_path(str(ROOT / "serve" / "compare.py"))
    cells = program["chosen_cells"](program["Options"](preset=("all",)), PAPER)
    assert {cell.preset for cell in cells} == set(presets.PRESETS) - {"maf"}
    assert "--maf-trace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "burtsy"), "did you mean 'bursty'"),
        (("--policies", "slakfit"), "did you mean 'slackfit'"),
        (("--preset", "maf"), "--maf-trace"),
        (("--preset", "maf", "--maf-trace", "missing.csv"), "missing.csv"),
        (("--profile", "missing.json"), "missing.json"),
        (("--scale", "0"), "--scale"),
        (("--seeds", "0"), "--seeds"),
    ],
)
def test_a_bad_option_ends_the_program_with_one_line_before_anything_runs(run_program, arguments, message):
    error = run_program("serve/compare.py", *arguments, status=2).stderr
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_neither_the_program_nor_its_processes_need_jax():
    code = "import runpy, sys; runpy.run_path('serve/compare.py'); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_policy_has_a_line_over_the_number_of_workers(tmp_path, monkeypatch):
    names = ["slackfit", "slackfit-paper", "least-accurate", "max-acc", "proteus"]
    about = {"preset": "scale", "trace": "steady", "scale": 1.0, "seed": 0, "workers": 8, "rate_qps": 9.0}
    figures_of = {"attainment": 1.0, "accuracy": 78.0, "fluid_accuracy": 79.0}
    drawn = []
    monkeypatch.setattr(figures.plots, "panels", lambda panels, path, **options: drawn.extend(panels))
    list(figures.draw([{**about, **figures_of, "policy": name} for name in names], tmp_path))
    assert [list(panel.lines) for panel in drawn] == [names]
