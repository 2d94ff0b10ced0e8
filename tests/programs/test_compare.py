"""serve/compare.py."""

import pathlib
import subprocess
import sys
import types

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
