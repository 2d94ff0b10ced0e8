"""serve/compare.py."""

import dataclasses
import pathlib
import re
import subprocess
import sys
import types

from pages import PAGES

from superserve_jax.experiments import presets
from superserve_jax.simulation import paper_profile


def test_the_program_prints_a_table_and_the_papers_figures_and_writes_the_results(run_program, tmp_path):
    paper_profile.paper_profile().save(tmp_path / "profile.json")
    options = ("--preset", "policies", "--seeds", 2, "--seconds", 0.3, "--jobs", 1, "--paper")
    files = ("--profile", tmp_path / "profile.json", "--plots", tmp_path / "plots")
    printed, _, results = run_program("serve/compare.py", *options, *files, json_file=True)
    assert {r["seed"] for r in results} == {0, 1}
    assert {r["scale"] for r in results} == {1.0}  # the presets' 1.9 belongs to the paper's profile
    assert all(0 <= r["attainment"] <= 1 for r in results)
    assert "1500+5550 cv2=8" in printed
    assert "up to 0.05 less at cv2=8" in printed
    assert (tmp_path / "plots" / "policies_x1.png").exists()


def test_without_the_azure_file_all_presets_but_that_one_run(run_program):
    cells = []
    runner = types.SimpleNamespace(evaluate=lambda chosen, *_, **__: cells.extend(chosen) or [])
    printed = run_program("serve/compare.py", "--preset", "all", patches={"runner": runner}).stdout
    assert {cell.preset for cell in cells} == set(presets.PRESETS) - presets.AZURE
    assert "--maf-trace" in printed


def test_neither_the_program_nor_its_processes_need_jax():
    code = "import runpy, sys; runpy.run_path('serve/compare.py'); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])


MINE = """
from superserve_jax.scheduling.policies import Decision

def mine(profile, state):
    return Decision(profile.rows[RANK].subnet, profile.max_batch)
"""


def test_a_policy_of_a_users_file_runs_in_several_processes_and_is_in_table_and_plots(run_program, tmp_path):
    (tmp_path / "mine.py").write_text(MINE.replace("RANK", "0"))
    options = ("--policies", f"{tmp_path}/mine.py:mine", "least-accurate", "--seeds", 2, "--seconds", 0.2, "--jobs", 2)
    files = ("--scale", 1, "--preset", "policies", "--plots", tmp_path / "plots")
    printed, _, results = run_program("serve/compare.py", *options, *files, json_file=True)
    assert {r["policy"] for r in results} == {"mine", "least-accurate"}
    assert re.search(r"1500\+5550 cv2=8 +x1 +mine +[01]\.\d{5}", printed)
    assert (tmp_path / "plots" / "policies_x1.png").exists()


def test_an_option_of_recorded_arrivals_is_refused_without_them(run_program):
    for option, value in ("--speed", "10.0"), ("--workers", "2"), ("--trace-column", "ts"), ("--slo-ms", "50.0"):
        error = run_program("serve/compare.py", option, value, status=2).stderr
        assert error == f"error: {option} {value} has no effect without --trace; give both or neither\n"


def test_a_policy_that_fails_ends_the_program_with_one_line(run_program, tmp_path):
    (tmp_path / "mine.py").write_text(MINE.replace("RANK", "99"))
    options = ("--policies", f"{tmp_path}/mine.py:mine", "--seconds", 0.1, "--seeds", 1, "--jobs", 1, "--preset", "policies")
    error = run_program("serve/compare.py", *options, status=2).stderr
    assert re.search(r"^error: the policy 'mine' failed: IndexError\(.*\), see .*mine\.py:5, `return Decision\(", error)
    assert error.count("\n") == 1


def test_recorded_arrivals_replace_the_presets(run_program, tmp_path):
    times = [1_795_800_605_000 + 10 * i for i in range(200)]  # Unix milliseconds
    (tmp_path / "web.csv").write_text("user,timestamp\n" + "".join(f"u,{t}\n" for t in times))
    options = ("--trace", tmp_path / "web.csv", "--trace-column", "timestamp", "--speed", 2, "--workers", 1)
    more = ("--policies", "slackfit", "fixed:all", "--scale", 1, "--plots", tmp_path / "plots")
    printed, stderr, results = run_program("serve/compare.py", *options, *more, json_file=True)
    assert "200 arrivals, column 'timestamp' holds Unix timestamps in ms, shifted to the first arrival, 2 times" in stderr
    assert "web, 2 times as fast: 200 queries in 1.0 s, SLO 36 ms\n" in printed
    assert "load at scale x1: 201 queries/s are 9.2 % of the throughput of 1 worker(s) with the fastest subnet" in printed
    assert re.search(r"x1 +slackfit +1\.00000 +- +\d+\.\d\d +- ", printed)  # one seed has no standard deviation
    assert "every policy met every deadline; for a harder comparison, raise --speed" in printed
    assert {(r["preset"], r["queries"], r["workers"], r["seed"]) for r in results} == {("trace", 200, 1, 0)}
    assert {r["policy"] for r in results} == {"slackfit", *(f"fixed:{i}" for i in range(6))}
    assert (tmp_path / "plots" / "trace_x1.png").exists()
    assert (tmp_path / "plots" / "trace_over_time_x1.png").exists()


def test_recorded_arrivals_get_the_slo_of_the_option_unless_the_file_has_some(run_program, tmp_path):
    times = [f"{0.01 * i:.2f}" for i in range(50)]
    (tmp_path / "web.csv").write_text("\n".join(["arrival_s", *times]))
    options = ("--policies", "fixed:0", "--scale", 1, "--slo-ms", 0.5, "--trace")
    printed, _, [result] = run_program("serve/compare.py", *options, tmp_path / "web.csv", json_file=True)
    assert result["attainment"] == 0.0
    assert "SLO 0.5 ms" in printed
    assert "SLO 36 ms" not in printed
    assert "for a harder comparison" not in printed
    (tmp_path / "web.csv").write_text("\n".join(["arrival_s,slo_ms", *(f"{t},20" for t in times)]))
    error = run_program("serve/compare.py", *options, tmp_path / "web.csv", status=2).stderr
    assert "--slo-ms 0.5 has no effect" in error
    assert "has a column slo_ms; leave out one of them" in error


def test_the_profile_of_an_export_is_found_and_several_or_none_are_named(run_program, tmp_path):
    options = ("--preset", "decisions", "--policies", "max-acc", "--seeds", 1, "--seconds", 0.1, "--profile", tmp_path)
    assert f"run `superserve measure {tmp_path}`" in run_program("serve/compare.py", *options, status=2).stderr
    profile = dataclasses.replace(paper_profile.paper_profile(), device="my card")
    profile.save(tmp_path / "profiles" / "my_card.json")
    assert "on my card" in run_program("serve/compare.py", *options).stdout
    profile.save(tmp_path / "profiles" / "other.json")
    error = run_program("serve/compare.py", *options, status=2).stderr
    assert f"name one of {tmp_path}/profiles/my_card.json, {tmp_path}/profiles/other.json" in error


def test_the_policy_in_the_docs_runs(run_program, tmp_path):
    [page] = [page for page in PAGES if page.name == "docs/policies.md"]
    [code] = [block.text for block in page.blocks if block.language == "py"]
    assert len([line for line in code.splitlines() if line]) <= 8
    (tmp_path / "my_policy.py").write_text(code)
    options = ("--policies", f"{tmp_path}/my_policy.py:my_policy", "fixed:all", "--seeds", 1, "--jobs", 1)
    done = run_program("serve/compare.py", *options, "--seconds", 0.3, "--preset", "policies", "--scale", 1, json_file=True)
    [mine, *_] = [r for r in done.json if r["policy"] == "my_policy"]
    assert mine["attainment"] > 0.5
    assert mine["accuracy"] > min(r["accuracy"] for r in done.json)
