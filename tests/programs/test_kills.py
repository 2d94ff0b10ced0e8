"""train/bench/kills.py with three kills. The full program has 30 of each."""

import pytest


@pytest.mark.slow
def test_killed_trainings_are_resumed_bit_for_bit_and_killed_exports_are_old_or_new(run_program, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in half the time
    options = ["--training", "1", "--exports", "2", "--seed", "3"]
    found = run_program("train/bench/kills.py", *options, json_file=True, fresh=True).json
    training, exports = found["training"], found["exports"]
    assert (len(training["kills"]), len(exports["kills"])) == (1, 2)
    assert {kill["phase"] for kill in training["kills"]} <= set(training["phases"])
    assert {"data", "step", "checkpoint", "checkpoint: rename", "export: rename"} <= set(training["phases"])
    assert {"weights", "payload: rename", "manifest: rename", "old payload: delete"} <= set(exports["phases"])
    assert training["counts"]["bit-equal"] == training["counts"]["trainings"] >= 1
    assert {kill["found"] for kill in exports["kills"]} <= {"old", "new"}
    assert not training["problems"] + exports["problems"]
