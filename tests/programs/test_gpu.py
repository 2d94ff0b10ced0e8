"""serve/bench/gpu.py in quick mode on the CPU: every kind of stage, and how a run ends and continues."""

import json

import gpu
import pytest


def read(folder, stage):
    return json.loads((folder / f"{stage}.json").read_text())


@pytest.mark.slow
def test_a_run_writes_what_each_stage_finds_and_the_next_one_continues(run_program, tmp_path):
    command = ("serve/bench/gpu.py", "configs/debug.py", "--quick", "--out", tmp_path, "--only")
    run_program(*command, "device", "variants", "overlap", "serving")
    assert {read(tmp_path, s)["state"] for s in ("device", "variants", "overlap", "serving")} == {"done"}
    found = read(tmp_path, "variants")["found"]
    assert len(found) == 28  # seven variants of two subnets at two batch sizes
    assert all(entry["alone_ms"] > 0 and entry["back_to_back_ms"] > 0 for entry in found)
    assert [load["load"] for load in read(tmp_path, "serving")["found"]["loads"]] == [0.3, 0.6, 0.9] * 2
    assert read(tmp_path, "device")["found"]["empty_call_ms"] > 0
    begun = read(tmp_path, "overlap")
    (tmp_path / "overlap.json").write_text(json.dumps({**begun, "state": "out of time", "found": None}))
    printed = run_program(*command, "device", "overlap").stdout
    assert "overlap: at most" in printed
    assert "device: at most" not in printed
    assert read(tmp_path, "overlap")["found"] is not None


def test_a_stage_that_takes_too_long_or_fails_does_not_end_the_run(run_program, tmp_path):
    command = ("serve/bench/gpu.py", tmp_path / "no.py", "--out", tmp_path, "--only", "device", "overlap")
    fast = {"LIMIT_S": {**gpu.LIMIT_S, "device": 0.2}, "_LEAST_S": 0.0}
    printed = run_program(*command, patches=fast).stdout
    assert "no config file" in printed
    states = {stage: read(tmp_path, stage)["state"] for stage in ("device", "overlap")}
    assert states == {"device": "out of time", "overlap": "failed"}


def test_without_time_left_no_stage_begins(run_program, tmp_path):
    printed = run_program("serve/bench/gpu.py", "--minutes", 0.01, "--out", tmp_path).stdout
    assert printed.count("no time left") == len(gpu.LIMIT_S) == len(gpu.STAGES)
    assert not list(tmp_path.glob("*.json"))
