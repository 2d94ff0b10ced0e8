"""The plain lines of `track`, on a clock that the work itself moves."""

import re

import pytest

from superserve_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """Returns a function that moves the clock of `progress`."""
    now_s = 0.0

    def move(seconds):
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    return move


def lines(capsys, clock, seconds, **options):
    """The lines about work whose items take so many seconds each."""
    for item_s in progress.track(seconds, "training", **options):
        clock(item_s)
    return capsys.readouterr().err.splitlines()


def test_compilation_at_the_start_does_not_count_as_speed(capsys, clock):
    """The first steps compile for 60 s. Each of the others takes 0.2 s."""
    printed = lines(capsys, clock, [20.0, 10.0, 10.0, 10.0, 10.0] + [0.2] * 795)
    assert printed[:5] == ["training: 1/800", "training: 2/800", "training: 3/800", "training: 4/800", "training: 5/800"]
    assert printed[5] == "training: 55/800, 5.0/s, 149 s left"
    assert printed[-1] == "training: 800 done in 219 s"
    found = [re.search(r"(\d+)/800, 5\.0/s, (\d+) s left", line).groups() for line in printed[5:-1]]
    assert all(abs(int(left_s) - 0.2 * (800 - int(done))) <= 1 for done, left_s in found)


def test_a_pause_such_as_a_validation_changes_the_time_left_only_a_little(capsys, clock):
    printed = lines(capsys, clock, [1.0] * 40 + [10.0] + [1.0] * 59)
    assert printed[0] == "training: 10/100"
    assert printed[3:5] == ["training: 40/100, 1.0/s, 60 s left", "training: 41/100, 0.8/s, 76 s left"]


def test_few_slow_items_have_a_time_left_after_the_first_one(capsys, clock):
    printed = lines(capsys, clock, [30.0, 10.0, 10.0, 10.0])
    assert printed == [
        *("training: 1/4", "training: 2/4, 0.1/s, 20 s left", "training: 3/4, 0.1/s, 10 s left"),
        *("training: 4/4, 0.1/s, 0 s left", "training: 4 done in 60 s"),
    ]


def test_work_that_goes_on_has_a_warm_up_again_and_work_of_unknown_length_no_time_left(capsys, clock):
    printed = lines(capsys, clock, [20.0] + [1.0] * 39, total=1000, completed=600, note=lambda: "loss 0.1")
    assert printed[0] == "training: 601/1000 loss 0.1"
    assert printed[2:4] == ["training: 621/1000, 1.0/s, 379 s left loss 0.1", "training: 631/1000, 1.0/s, 369 s left loss 0.1"]
    printed = lines(capsys, clock, iter([1.0] * 40))
    assert printed == [
        "training: 10/?",
        "training: 20/?",
        "training: 30/?, 1.0/s",
        "training: 40/?, 1.0/s",
        "training: 40 done in 40 s",
    ]
