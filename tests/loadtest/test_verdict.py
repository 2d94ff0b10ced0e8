"""Which fixed models keep up, and the sentence that ends a replay."""

import dataclasses
import math

import pytest

from superserve_jax.loadtest.verdict import LEEWAY, Outcome, compare_with_fixed


def row(name, attainment, profiled, measured=None):
    return Outcome(name, name, attainment, profiled, profiled if measured is None else measured)


SLACKFIT = row("slackfit", 0.9998, 92.0, 93.0)


def test_the_most_accurate_fixed_model_within_the_leeway_is_the_one_to_beat():
    fixed = [row("fixed:0", 1.0, 88.0), row("fixed:1", 0.9998 - LEEWAY, 90.0, 90.5), row("fixed:2", 0.9987, 91.0)]
    verdict = compare_with_fixed([SLACKFIT, *fixed, row("fixed:3", 0.4, 95.0)])
    assert verdict.names == ["slackfit", "fixed:1", "fixed:2"]
    assert verdict.gain == pytest.approx(2.5)
    assert "2.5 points more than fixed:1" in str(verdict)
    assert "fixed:2 is more accurate and missed 0.13 %." in str(verdict)


def test_profiled_accuracy_chooses_the_model_and_measured_accuracy_gives_the_gain():
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 1.0, 88.0, 94.0), row("fixed:1", 1.0, 89.0, 93.5)])
    assert verdict.names == ["slackfit", "fixed:1"]
    assert verdict.gain == pytest.approx(-0.5)
    assert "0.5 points less than fixed:1" in str(verdict)


def test_a_model_that_failed_by_a_disturbance_does_not_hide_a_more_accurate_one_that_keeps_up():
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 1.0, 88.0), row("fixed:1", 0.9, 90.0), row("fixed:2", 1.0, 91.0)])
    assert verdict.names == ["slackfit", "fixed:2"]
    assert "fixed:2 is the most accurate one replayed, so there is little to gain" in str(verdict)


def test_a_fixed_model_that_met_no_deadline_fails():
    nothing = row("fixed:2", 0.0, math.nan)
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 1.0, 88.0), nothing])
    assert (verdict.best.name, verdict.failing) == ("fixed:0", nothing)
    assert str(verdict).endswith("the most accurate fixed model that keeps up; fixed:2 met no deadline.")
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 1.0, 88.0), row("fixed:1", 0.7, 90.0), nothing])
    assert verdict.failing.name == "fixed:1"
    verdict = compare_with_fixed([row("slackfit", 0.0005, 92.0), nothing])
    assert (verdict.best, verdict.failing) == (None, nothing)


def test_of_two_equally_accurate_models_the_failing_one_is_not_called_more_accurate():
    verdict = compare_with_fixed([SLACKFIT, row("fixed:largest", 0.9, 91.0), row("fixed:2", 1.0, 91.0)])
    assert (verdict.best.name, verdict.failing) == ("fixed:2", None)


def test_the_sentence_names_disturbed_rows_that_decide_it():
    """A disturbed fixed model seems not to keep up. Then the policy is compared with a less accurate one."""
    stalled = dataclasses.replace(row("fixed:1", 0.99, 91.0), disturbance="the process stood still for 40 ms")
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 1.0, 88.0), stalled, row("fixed:2", 0.5, 93.0)])
    assert verdict.disturbed == ("fixed:1",)
    assert str(verdict).endswith(" The machine was disturbed during fixed:1, so this comparison does not count.")
    verdict = compare_with_fixed([SLACKFIT, stalled, row("fixed:2", 1.0, 92.0), row("fixed:3", 0.5, 93.0)])
    assert verdict.disturbed == ()


def test_no_fixed_model_keeps_up():
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 0.95, 88.0), row("fixed:1", 0.0, math.nan)])
    assert verdict.best is None
    assert math.isnan(verdict.gain)
    assert str(verdict).endswith("No fixed model met as many deadlines; the closest one, fixed:0, missed 5.00 %.")
    verdict = compare_with_fixed([SLACKFIT, row("fixed:0", 0.8, 88.0), row("fixed:1", 0.97, 90.0)])
    assert verdict.failing.name == "fixed:1"


def test_a_policy_that_met_nothing_says_so():
    assert "met no deadline" in str(compare_with_fixed([row("slackfit", 0.0, math.nan), row("fixed:0", 0.0, math.nan)]))


def test_the_default_policy_is_preferred_and_both_kinds_are_needed():
    other, fixed = row("slackfit-paper", 1.0, 92.0), row("fixed:0", 1.0, 88.0)
    assert compare_with_fixed([other, SLACKFIT, fixed]).policy is SLACKFIT
    assert compare_with_fixed([other, fixed]).policy is other
    assert compare_with_fixed([fixed]) is None
    assert compare_with_fixed([SLACKFIT, other]) is None
