"""The program that simulates an autoscaled day: that its table and its plot are made, and that fixed fleets are fixed."""

import pytest

SMALL = "--minutes 60 --mean-qps 900 --night 0.5 --first 1 --least 1 --most 6 --low-s 300 --fixed 2 4 --sample-s 0.1"


def test_a_day_is_simulated_and_drawn(run_program, tmp_path):
    plot = tmp_path / "day.png"
    done = run_program("serve/bench/autoscale.py", *SMALL.split(), "--plot", plot, json_file=True)
    scaled, two, four = done.json.values()
    assert (two["worker_hours"], four["worker_hours"]) == (pytest.approx(2.0), pytest.approx(4.0))
    assert 1.0 < scaled["worker_hours"] < 4.0
    assert two["lowest_hour"] <= two["accuracy"] < four["accuracy"]
    assert "autoscaled, 300 s" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_a_fleet_nothing_is_simulated(run_program):
    done = run_program("serve/bench/autoscale.py", "--fixed", "--low-s", "--minutes", "1", status=2)
    assert "low_s and fixed are both empty" in done.stderr
