"""train/bench/step.py and train/standalone.py as a user runs them, on the tiny network of configs/debug.py."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def test_the_bench_counts_compilations_and_times_every_program(run_program):
    options = ["--batch-size", "8", "--repetitions", "4"]
    printed, _, found = run_program("train/bench/step.py", "configs/debug.py", *options, json_file=True, fresh=True)
    assert found["compilations"] <= found["compilations_bound"] == 2 + 4
    assert found["compilations_while_measuring"] == 0
    assert len(found["ratios"]) == 4
    assert found["programs"][0]["name"].startswith("largest")
    assert f"ratio {found['ratio']:.3f}" in printed


def test_subnets_of_a_run_are_trained_alone_once_and_compared(run_program, digits_dir, tmp_path):
    run = tmp_path / "run"
    data = ["--data.data-dir", digits_dir, "--data.validation", "20", "--epochs", "0.5"]
    run_program("train/supernet.py", "configs/debug.py", "--workdir", run, *data)
    printed, _, rows = run_program("train/standalone.py", run, json_file=True)
    shared = json.loads((run / "evaluation.json").read_text())
    assert [r["name"] for r in rows] == ["smallest", "largest"]
    assert [r["subnet"] for r in rows] == [shared[0]["subnet"], shared[-1]["subnet"]]
    assert [r["accuracy"] for r in rows] == [shared[0]["accuracy"], shared[-1]["accuracy"]]
    assert "price of sharing" in printed
    again = run_program("train/standalone.py", run, "--subnets", "smallest", json_file=True)
    assert "training" not in again.stderr
    assert again.json == rows[:1]
    for arguments, message in ((["--subnets", "99"], "must be smallest"), (["--subnets", "smalest"], "got 'smalest'")):
        assert message in run_program("train/standalone.py", run, *arguments, status=2).stderr
