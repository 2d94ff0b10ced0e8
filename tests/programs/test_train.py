"""train/bench/step.py and train/standalone.py as a user runs them, on the minute network of configs/debug.py."""

import json
import pathlib
import subprocess
import sys

import pytest

from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.cluttered_digits import render

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def program(*arguments, check=True):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_bench_counts_compilations_and_times_every_program(tmp_path):
    out = tmp_path / "out.json"
    done = program("train/bench/step.py", "configs/debug.py", "--batch-size", "8", "--repetitions", "4", "--json", out)
    found = json.loads(out.read_text())
    assert found["compilations"] <= found["compilations_bound"] == 2 + 4
    assert found["compilations_while_measuring"] == 0
    assert len(found["ratios"]) == 4
    assert found["programs"][0]["name"].startswith("largest")
    assert f"ratio {found['ratio']:.3f}" in done.stdout


def test_subnets_of_a_run_are_trained_alone_once_and_compared(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "NUM_IMAGES", {"train": 300, "test": 90})
        prepared.load("cluttered_digits", str(tmp_path / "tfds"))
    run = tmp_path / "run"
    data = ["--data.data-dir", tmp_path / "tfds", "--data.validation", "20", "--epochs", "0.5"]
    program("train/supernet.py", "configs/debug.py", "--workdir", run, *data)
    out = tmp_path / "out.json"
    done = program("train/standalone.py", run, "--json", out)
    shared = json.loads((run / "evaluation.json").read_text())
    rows = json.loads(out.read_text())
    assert [r["name"] for r in rows] == ["smallest", "largest"]
    assert [r["subnet"] for r in rows] == [shared[0]["subnet"], shared[-1]["subnet"]]
    assert [r["accuracy"] for r in rows] == [shared[0]["accuracy"], shared[-1]["accuracy"]]
    assert "price of sharing" in done.stdout
    again = program("train/standalone.py", run, "--subnets", "smallest", "--json", out)
    assert "training" not in again.stderr
    assert json.loads(out.read_text()) == rows[:1]
    for arguments, message in ((["--subnets", "99"], "must be 'smallest'"), (["--subnets", "smalest"], "got 'smalest'")):
        done = program("train/standalone.py", run, *arguments, check=False)
        assert done.returncode == 2
        assert message in done.stderr
