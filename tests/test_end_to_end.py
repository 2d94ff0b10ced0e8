"""The programs as a user runs them, on the tiny network of configs/debug.py."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import superserve_jax as ss
from superserve_jax.commands import replay_setup

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def trained(run_program, data_dir, tmp_path_factory):
    """A run of the whole training program, with an export."""
    workdir = tmp_path_factory.mktemp("runs") / "debug"
    command = ["train/supernet.py", "configs/debug.py", "--workdir", workdir, "--data.data-dir", data_dir]
    assert "test accuracy" in run_program(*command, fresh=True).stdout
    return workdir


def start(command, file, lines):
    """Starts a program, and returns it when a file that it writes has so many lines."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    return process


def test_one_command_leads_from_a_config_to_an_export(trained):
    model = ss.load(trained / "export")
    assert len(model.subnets) >= 2
    assert model.manifest["training"]["name"] == "debug"
    assert {"metrics.png", "search.png", "evaluation.json", "config.json"} <= set(os.listdir(trained))


@pytest.mark.parametrize("name", ["search", "calibrate", "evaluate", "export"])
def test_each_stage_is_a_program_of_its_own(run_program, trained, name):
    done = run_program(f"train/{name}.py", trained, json_file=True)
    assert done.json
    assert done.stdout.strip()


def test_a_search_that_was_killed_resumes_to_the_result_of_an_undisturbed_one(run_program, trained, tmp_path):
    for name in ("killed", "undisturbed"):
        shutil.copytree(trained, tmp_path / name)
        (tmp_path / name / "search.jsonl").unlink()
    options = ("--candidates", 48, "--examples", 1000)
    killed, undisturbed = (["train/search.py", tmp_path / name, *options] for name in ("killed", "undisturbed"))
    process = start(killed, tmp_path / "killed" / "search.jsonl", 6)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "candidates already; going on from there" in run_program(*killed).stderr
    run_program(*undisturbed)
    results = [(tmp_path / name / "search.json").read_bytes() for name in ("killed", "undisturbed")]
    assert results[0] == results[1]


def test_measuring_and_replaying_give_a_table_a_plot_and_json(run_program, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_CACHE", str(tmp_path / "cache"))  # so that only the first program compiles
    run_program("serve/measure.py", trained / "export", "--repeats", "3", "--json", tmp_path / "profile.json", fresh=True)
    profile = ss.Profile.load(tmp_path / "profile.json")
    replay = ["serve/replay.py", trained / "export", "--repeats", "0"]
    (tmp_path / "web.csv").write_text("at,user\n" + "".join(f"{1_795_800_605_000 + 20 * i},u\n" for i in range(20)))
    web = ["--trace", tmp_path / "web.csv", "--trace-column", "at", "--speed", "2"]
    done = run_program(*replay, *web, "--plot", tmp_path / "p.png", json_file=True, fresh=True)
    results = done.json["policies"]
    names = ["slackfit", "slackfit-paper", *(f"fixed:{i}" for i in range(len(profile.rows)))]
    assert [r["name"] for r in results] == names
    for r in results:
        assert 0 <= r["attainment"] <= 1
        assert {"accuracy_profiled", "accuracy_measured", "p50_ms", "p99_ms"} <= set(r)
    assert "slackfit (default)" in done.stdout
    assert f"{len(names)} replays of" in done.stdout.splitlines()[2]
    assert done.stdout.splitlines()[-1].startswith("slackfit (default) met ")
    assert done.json["verdict"]["policy"]["name"] == "slackfit"
    assert (tmp_path / "p.png").stat().st_size > 1000

    monkeypatch.setattr(replay_setup, "TIMING_S", 0.2)  # the next replays run in this process
    options = ["--seconds", "4", "--policies", "slackfit", "fixed:0", "--simulate"]
    done = run_program(*replay, *options, json_file=True)
    assert done.json["trace"].startswith("bursts of ")
    assert "the same traffic in the simulator: real / simulated" in done.stdout
    simulated = done.json["policies"]
    assert [r["name"] for r in simulated] == ["slackfit", "fixed:0"]
    for r in simulated:
        assert 0 <= r["simulated_attainment"] <= 1
        assert r["overhead_ms"] >= 0
        assert r["stalled_s"] >= 0
        assert f"{100 * r['attainment']:.2f} / {100 * r['simulated_attainment']:.2f} %" in done.stdout

    mine = "def mine(profile, state):\n    return Decision(profile.rows[RANK].subnet, 4)\n"
    (tmp_path / "mine.py").write_text(f"from superserve_jax import Decision\nRANK = 0\n{mine}")
    (tmp_path / "bad.py").write_text(f"from superserve_jax import Decision\nRANK = 99\n{mine}")
    done = run_program(*replay, *web, "--policies", f"{tmp_path}/mine.py:mine", json_file=True)
    assert [r["name"] for r in done.json["policies"]] == ["mine"]
    assert done.stdout.startswith("web, 2 times as fast: 20 queries in 0.2 s")
    error = run_program(*replay, *web, "--policies", f"{tmp_path}/bad.py:mine", status=2).stderr
    assert re.search(r"^error: the policy 'mine' failed: IndexError.*bad\.py:4, `return", error, re.MULTILINE)

    (tmp_path / "none.csv").write_text("arrival_s\n")
    assert "has no arrivals" in run_program(*replay, "--trace", tmp_path / "none.csv", status=2).stderr


def test_ctrl_c_keeps_the_work_and_the_same_command_resumes(run_program, tmp_path, data_dir, trained):
    command = ["train/supernet.py", "configs/debug.py", "--workdir", tmp_path / "run", "--data.data-dir", data_dir]
    command += ["--epochs", "40", "--checkpoint-every", "1000000", "--train-only"]
    process = start(command, tmp_path / "run" / "metrics.jsonl", 1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert "run the same command to go on" in stderr
    assert "Traceback" not in stderr
    [step] = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert step >= 5
    assert "epochs: 40.0 -> 41.0" in run_program(*command, "--epochs", "41", status=2).stderr
