"""Simulations in a process of their own, and the arrivals that they get."""

import numpy as np
import pytest
from policy_cases import PAPER

from superserve_jax import errors
from superserve_jax.scaling.recent import Recent
from superserve_jax.scaling.what_if import Question


def test_another_process_gives_the_same_answer_or_says_why_not():
    question = Question(PAPER, "slackfit", 36.0, [np.linspace(0, 1, 500), np.linspace(0, 1, 3000)], workers=1)
    answer = question.ask()
    assert answer == question.answer()
    assert [served.queries for served in answer] == [500, 3000]
    with pytest.raises(errors.SuperServeError, match=r"the simulation of 1 workers failed: .*did you mean 'slackfit'"):
        question._replace(policy="slakfit").ask()


def test_seconds_have_the_arrivals_that_were_counted():
    recent = Recent(keep_s=100.0)
    for i in range(2001):
        recent.read(0.05 * i, (i // 10) ** 2)
    found = recent.seconds(100.0)
    assert len(found) <= 30
    assert all((np.diff(second) >= 0).all() and second[0] >= 0 and second[-1] <= 1.01 for second in found)
    assert [len(second) for second in found] == sorted(len(second) for second in found)
    last = recent.seconds(10.0)
    assert len(last) in (9, 10)
    assert sum(map(len, last)) == pytest.approx(200**2 - 180**2, rel=0.1)


def test_times_between_readings_that_are_too_long_are_left_out():
    recent = Recent(keep_s=100.0)
    assert recent.seconds(100.0) == []
    for i in range(50):
        recent.read(1.0 * i, i)
    assert recent.seconds(100.0) == []


def test_old_readings_are_forgotten():
    recent = Recent(keep_s=2.0)
    for i in range(400):
        recent.read(0.05 * i, 3 * i)
    assert len(recent.seconds(100.0)) in (1, 2)
