import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.experiments import paper_table, summaries
from superserve_jax.experiments.summaries import Point

# Lines through (70, 1.0), (74, 0.8), (78, 0.2).
FIXED = [Point(78.0, 0.2), Point(70.0, 1.0), Point(74.0, 0.8)]


def result(policy, attainment, accuracy, *, seed=0, preset="maf", trace="t", scale=1.0, **more):
    figures = {"attainment": attainment, "accuracy": accuracy, "fluid_accuracy": 79.0}
    return {"preset": preset, "trace": trace, "scale": scale, "policy": policy, "seed": seed, **figures, **more}


@pytest.mark.parametrize(
    ("policy", "models", "expected"),
    [
        # At 0.9 the lines are at 72, half way from 1.0 to 0.8; the next better model is the one of 70.
        # At 76 the lines attain 0.5, half way from 0.8 to 0.2; the next better model is the one of 78, which attains 0.2.
        ((76.0, 0.9), FIXED, (4.0, 6.0, 1.8, 4.5)),
        ((75.0, 0.65), FIXED, (0.0, 1.0, 1.0, 3.25)),  # on the lines
        *((model, FIXED, (0.0, 0.0, 1.0, 1.0)) for model in FIXED),
        # Beyond the models the nearest one counts.
        ((72.0, 1.0), [(70.0, 0.9), (78.0, 0.2)], (2.0, 2.0, 1.0 / 0.725, 5.0)),
        ((79.0, 0.6), FIXED, (79 - 74 - 4 / 3, 5.0, 3.0, 3.0)),
        ((69.0, 0.5), FIXED, (-7.0, -5.0, 0.5, 0.5)),
        # Models that attain nothing leave an infinite gain.
        ((75.0, 0.9), [(70.0, 1.0), (74.0, 0.0), (78.0, 0.0)], (4.6, 5.0, math.inf, math.inf)),
        # The lines need not fall: at 0.9 the most accurate place on them is on the way down from 76.
        ((77.0, 0.9), [(70.0, 0.8), (76.0, 1.0), (78.0, 0.8)], (0.0, 1.0, 1.0, 1.125)),
    ],
)
def test_gains_equal_examples_worked_out_by_hand(policy, models, expected):
    assert summaries.gain(Point(*policy), itertools.starmap(Point, models)) == pytest.approx(expected)


def test_without_fixed_models_there_is_no_gain():
    with pytest.raises(errors.ConfigError, match="fixed:all"):
        summaries.gain(Point(75.0, 0.9), [])


@given(
    st.lists(st.tuples(st.floats(70, 80), st.floats(0.01, 1)), min_size=1, max_size=6, unique_by=lambda p: p[0]),
    st.floats(70, 80),
    st.floats(0.01, 1),
)
def test_where_attainment_falls_with_accuracy_the_lines_are_never_kinder_than_the_models(models, accuracy, attainment):
    accuracies, attainments = sorted(m[0] for m in models), sorted((m[1] for m in models), reverse=True)
    g = summaries.gain(Point(accuracy, attainment), map(Point, accuracies, attainments))
    assert g.points_line <= g.points + 1e-9
    assert g.times_line <= g.times * (1 + 1e-9)


def test_summaries_are_means_over_seeds_with_their_spread():
    results = [result("a", 1.0, 76.0), result("b", 0.5, None), result("a", 0.98, 77.0, seed=1)]
    a, b = summaries.summarize(results)
    assert (a.policy, a.attainment, a.accuracy) == ("a", pytest.approx(0.99), pytest.approx(76.5))
    assert (a.sd("attainment"), a.sd("accuracy")) == (pytest.approx(0.02 / math.sqrt(2)), pytest.approx(1 / math.sqrt(2)))
    assert (b.attainment, b.sd("attainment"), math.isnan(b.accuracy)) == (0.5, 0.0, True)


def test_gains_are_read_seed_by_seed_and_then_averaged():
    fixed = [result(f"fixed:{i}", p.attainment, p.accuracy, seed=s) for s in (0, 1) for i, p in enumerate(sorted(FIXED))]
    mine = [result("slackfit", 0.9, 76.0, seed=0), result("slackfit", 0.8, 76.0, seed=1)]
    g = summaries.gains(summaries.summarize([*fixed, *mine]), "slackfit")
    assert g["t"].points_line == pytest.approx((4.0 + 2.0) / 2)
    assert g["t"].times_line == pytest.approx((1.8 + 1.6) / 2)


def test_the_papers_numbers_are_put_beside_ours():
    fixed = [result(f"fixed:{i}", p.attainment, p.accuracy) for i, p in enumerate(sorted(FIXED))]
    found = {f.what: f for f in paper_table.compare([*fixed, result("slackfit", 0.9, 76.0)])}
    assert found["accuracy at equal attainment"].paper == "+4.67 points"
    assert found["accuracy at equal attainment"].ours.startswith("+4.00 on the lines, +6.00 strictly; +9.00")
    assert found["attainment at equal accuracy"].ours == "1.80x on the lines, 4.5x strictly"
    assert found["attainment below the least accurate model's"].ours == "+0.1000"


def test_a_comparison_keeps_scales_apart_and_leaves_out_what_was_not_run():
    results = [result("slackfit", a, 76.0, preset="acceleration", scale=s) for s, a in ((1.0, 1.0), (1.9, 0.9))]
    found = [f for f in paper_table.compare(results) if f.what == "attainment"]
    assert [(f.scale, f.ours) for f in found] == [(1.0, "1.0000"), (1.9, "0.9000")]
    assert paper_table.compare([result("max-acc", 0.5, 76.0, preset="unknown")]) == []
