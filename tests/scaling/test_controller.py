"""The autoscaler's rule: when it adds workers, how many, and when it removes one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.scaling.controller import Controller, Goal
from superserve_jax.scaling.what_if import Served

MINUTE = 60.0
GOAL = Goal(0.75, most=8, least=2, low_s=300.0, rest_s=600.0, recent_s=1200.0, margin=0.01)


def reading(accuracy, queries=100):
    return Served(queries, queries, queries * accuracy)


def linear(workers, seconds):
    """Each worker is worth a point of accuracy, in every minute."""
    return [reading(0.70 + 0.01 * workers)] * round(seconds / MINUTE)


def run(accuracies, *, goal=GOAL, forecast=linear, alive=3, starting=0):
    """The controller's steps, one a minute. The fleet does not change."""
    controller = Controller(goal, forecast)
    controller.step(0.0, Served(), alive=alive, starting=starting)
    return [
        controller.step(MINUTE * (i + 1), reading(accuracy), alive=alive, starting=starting)
        for i, accuracy in enumerate(accuracies)
    ]


def test_workers_are_added_after_low_s_as_many_as_the_simulator_says():
    assert run([0.73] * 4) == [0] * 4
    assert run([0.73] * 5) == [0, 0, 0, 0, 2]  # from 3 to 5 workers, with which the simulated accuracy is 0.75


def test_after_a_change_the_accuracy_must_be_low_for_as_long_again():
    assert run([0.73] * 10) == [0, 0, 0, 0, 2, 0, 0, 0, 0, 2]  # the fleet of `run` does not grow


def test_a_short_burst_adds_no_worker_however_low_the_accuracy_is():
    assert run([0.76, 0.76, 0.2, 0.76, 0.76] * 4, alive=3) == [0] * 20
    assert run([0.2, 0.2, 0.2, 0.76, 0.76], alive=3) == [0, 0, 0, 0, 2]


def test_no_more_than_most_are_added_and_at_least_one():
    assert run([0.60] * 5, forecast=lambda *_: [reading(0.5)]) == [0, 0, 0, 0, 5]
    assert run([0.73] * 5, forecast=lambda *_: [reading(0.9)]) == [0, 0, 0, 0, 1]  # the simulator is too optimistic
    assert run([0.73] * 5, forecast=lambda *_: []) == [0, 0, 0, 0, 1]  # it knows nothing
    assert run([0.60] * 5, alive=8) == [0] * 5


def test_workers_that_start_count_as_present():
    assert run([0.73] * 20, alive=3, starting=2) == [0] * 20
    assert run([0.73] * 5, alive=3, starting=1) == [0, 0, 0, 0, 1]


def test_a_worker_is_removed_if_one_fewer_would_have_done_all_the_time():
    goal = Goal(0.75, most=8, low_s=300.0, rest_s=600.0, recent_s=1200.0, margin=0.01)
    assert run([0.80] * 9, goal=goal, alive=7) == [0] * 9
    assert run([0.80] * 10, goal=goal, alive=7)[-1] == -1  # six workers reach 0.76, which is the target and the margin
    assert run([0.80] * 40, goal=goal, alive=6) == [0] * 40  # five reach 0.75

    def once_low(workers, seconds):
        return [reading(0.80)] * 10 + [reading(0.70)] * 5 + [reading(0.80)] * 5

    assert run([0.80] * 40, goal=goal, alive=7, forecast=once_low) == [0] * 40


def test_what_counts_as_low_is_never_shorter_than_low_s():
    short = [reading(0.80)] * 13 + [reading(0.70)] * 4 + [reading(0.80)] * 13  # 80 of 600 s, as no more is known yet
    goal = Goal(0.75, most=8, low_s=300.0, rest_s=600.0, recent_s=3600.0, margin=0.01)
    assert run([0.80] * 10, goal=goal, alive=7, forecast=lambda *_: short)[-1] == -1
    long = [reading(0.80)] * 8 + [reading(0.70)] * 15 + [reading(0.80)] * 7
    assert run([0.80] * 10, goal=goal, alive=7, forecast=lambda *_: long)[-1] == 0

    two = [reading(0.80)] * 4 + [reading(0.75)] * 2 + [reading(0.80)] * 4  # 240 of 1200 s
    goal = Goal(0.75, most=8, low_s=300.0, rest_s=1200.0, recent_s=1200.0, margin=0.01)
    assert run([0.80] * 20, goal=goal, alive=7, forecast=lambda *_: two)[-1] == -1


def test_no_worker_is_removed_while_another_starts_or_below_least():
    assert run([0.80] * 40, alive=7, starting=1) == [0] * 40
    assert run([0.80] * 40, alive=2, forecast=lambda *_: [reading(0.9)]) == [0] * 40
    assert run([0.80] * 40, alive=7, forecast=lambda *_: []) == [0] * 40


def test_bounds_are_kept_at_once():
    assert run([0.80], alive=1) == [1]
    assert run([0.80], alive=0, starting=1) == [1]
    assert run([0.80], alive=9) == [-1]


def test_a_worker_that_counts_as_alive_and_as_starting_does_not_exceed_the_bound():
    assert run([0.80], alive=8, starting=1) == [0]
    assert run([0.80], alive=9, starting=1) == [0]


def test_without_queries_workers_are_removed_only_if_the_simulator_knows_the_traffic():
    controller = Controller(GOAL, lambda workers, seconds: [Served()] * 20)
    steps = [controller.step(MINUTE * i, Served(), alive=5, starting=0) for i in range(12)]
    assert steps == [0] * 10 + [-1, 0]


def test_the_simulator_is_asked_at_most_once_in_low_s():
    asked = []

    def forecast(workers, seconds):
        asked.append(seconds)
        return [reading(0.5)]

    run([0.80] * 60, alive=7, forecast=forecast)
    assert asked == [1200.0] * 11  # from minute 10 on, every 5 minutes


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_fleet_stays_within_its_bounds(data):
    goal = Goal(0.75, most=4, least=2, low_s=60.0, rest_s=60.0, recent_s=120.0)
    accuracy = st.floats(0.0, 1.0)
    controller = Controller(goal, lambda *_: [reading(data.draw(accuracy))])
    alive, starting = 3, 0
    for minute in range(20):
        by = controller.step(MINUTE * minute, reading(data.draw(accuracy)), alive=alive, starting=starting)
        starting, alive = starting + max(by, 0), alive + min(by, 0)
        assert goal.least <= alive + starting <= goal.most
        ready = data.draw(st.integers(0, starting))
        alive, starting = alive + ready, starting - ready


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_accuracy": 76.0}, "target_accuracy must be a fraction between 0 and 1, got 76.0"),
        ({"least": 9}, "1 <= least <= most, got least=9 and most=8"),
        ({"least": 0}, "1 <= least <= most"),
        ({"most": 2.5}, "whole numbers of workers"),
        ({"low_s": -1.0}, "low_s must be a finite number from 0 up, got -1.0"),
        ({"recent_s": float("nan")}, "recent_s must be a finite number"),
    ],
)
def test_an_impossible_goal_is_refused(wrong, message):
    with pytest.raises(errors.ConfigError, match=message):
        Goal(**{"target_accuracy": 0.75, "most": 8, **wrong})
