import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import PAPER, SLOWED, choose, make_profile, profiles, states

from superserve_jax import errors
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision, Fixed, MaxAcc, MaxBatch, PaperSlackFit, Planner, SlackFit, State
from superserve_jax.scheduling.policies.base import Table
from superserve_jax.subnet import Subnet

NAMES = [*policies.NAMES, "fixed:2"]


@pytest.mark.parametrize("name", policies.NAMES)
def test_a_policy_has_the_name_that_makes_it(name):
    made = policies.create(name, PAPER).name
    assert made == {"fixed:smallest": "fixed:0", "fixed:largest": "fixed:5"}.get(name, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_made_by_name_answers_with_a_subnet_and_a_batch_of_the_profile(name):
    policy = policies.create(name, PAPER)
    for slack_ms, waiting in itertools.product((-5.0, 0.0, 1.5, 8.0, 36.0, 1e4), (1, 7, 16, 1000)):
        decision = policy(PAPER, State(0.0, slack_ms, waiting))
        assert PAPER.row(decision.subnet)
        assert 1 <= decision.batch <= PAPER.max_batch


@pytest.mark.parametrize("name", [n for n in NAMES if n != "slackfit"])
@given(data=st.data())
def test_a_policy_exceeds_the_slack_only_if_none_of_its_choices_fits(name, data):
    profile = data.draw(profiles()).pareto().monotone()
    if name == "fixed:2" and len(profile.rows) < 3:
        return
    state = data.draw(states(profile))
    policy = policies.create(name, profile)
    decision = policy(profile, state)
    rows = [profile.row(decision.subnet)] if name.startswith(("fixed", "least")) else profile.rows
    choices = [ms for row in rows for ms in row.latency_ms]
    if name in ("slackfit-paper", "slackfit-cumulative"):  # they know only the choices that a latency bucket keeps
        decided = [policy(profile, state._replace(slack_ms=ms)) for ms in choices]
        taken = [profile.latency_ms(d.subnet, d.batch) for d in decided]
        choices = [ms for slack_ms, ms in zip(choices, taken, strict=True) if ms <= slack_ms]
        assert choices
    if any(ms <= state.slack_ms for ms in choices):
        assert profile.latency_ms(decision.subnet, decision.batch) <= state.slack_ms


def test_max_acc_prefers_accuracy_and_max_batch_prefers_the_batch():
    profile = make_profile([(1, 2, 4), (3, 5, 9)])
    assert choose(MaxAcc(profile), profile, 4.5) == (1, 1)
    assert choose(MaxBatch(profile), profile, 4.5) == (0, 4)
    assert choose(MaxBatch(profile), profile, 9.0) == (1, 4)


def test_a_fixed_subnet_fits_its_batch_into_the_slack_and_runs_a_full_batch_if_the_head_is_lost():
    policy = policies.create("fixed:largest", PAPER)
    assert [choose(policy, PAPER, slack_ms) for slack_ms in (36, 20, 5, 4)] == [(5, 16), (5, 8), (5, 1), (5, 16)]


def test_each_latency_bucket_keeps_the_largest_batch_then_the_most_accurate_subnet():
    # A choice is (rank, batch). The latency bucket from 1 to 5.5 ms keeps (0, 4), which takes 4 ms. In the bucket from 5.5 to
    # 10 ms, (1, 4) takes 9 ms and (2, 4) takes 10 ms. It keeps (2, 4), which is more accurate.
    profile = make_profile([(1, 2, 4), (3, 5, 9), (6, 8, 10)])
    policy = PaperSlackFit(profile, buckets=2)
    assert [choose(policy, profile, ms) for ms in (10, 9.9, 4, 3.9)] == [(2, 4), (0, 4), (0, 4), (0, 4)]


def test_the_two_readings_differ_if_a_latency_bucket_has_only_small_batches():
    # The third of four latency buckets, 6.5 to 9.25 ms, holds (1, 1) and (1, 2). With "cumulative" it also holds (0, 4).
    profile = make_profile([(1, 2, 4), (7, 9, 12)], batch_sizes=(1, 2, 4))
    in_range = PaperSlackFit(profile, buckets=4)
    cumulative = PaperSlackFit(profile, buckets=4, cumulative=True)
    assert choose(in_range, profile, 9.5) == (1, 2)
    assert choose(cumulative, profile, 9.5) == (0, 4)


@settings(deadline=None)
@given(data=st.data())
def test_a_policy_is_a_pure_function_of_the_state(data):
    state = data.draw(states(PAPER))
    for name in policies.NAMES:
        policy = policies.create(name, PAPER)
        assert policy(PAPER, state) == policy(PAPER, state) == policies.create(name, PAPER)(PAPER, state)


def test_create_returns_a_callable_unchanged():
    def policy(profile, state):
        return Decision(profile.rows[0].subnet, 1)

    assert policies.create(policy, PAPER) is policy


def test_a_mistyped_policy_gets_the_nearest_name_suggested():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'slackfit'"):
        policies.create("slakfit", PAPER)
    with pytest.raises(errors.UnknownNameError, match="fixed:<i>"):
        policies.create("fixed:x", PAPER)


def test_values_that_cannot_work_are_refused_at_construction():
    with pytest.raises(errors.ConfigError, match="0 to 5"):
        policies.create("fixed:6", PAPER)
    with pytest.raises(errors.ConfigError, match="buckets"):
        PaperSlackFit(PAPER, buckets=0)
    with pytest.raises(errors.ConfigError, match="reserve"):
        SlackFit(PAPER, reserve=1.5)
    with pytest.raises(errors.ConfigError, match="risk"):
        SlackFit(PAPER, risk=0.0)
    with pytest.raises(errors.ConfigError, match="period_s"):
        Planner(PAPER, period_s=0.0)
    with pytest.raises(errors.ProfileError, match="not in the profile"):
        Fixed(PAPER, Subnet((0,)))


def test_the_table_finds_choices_by_rank_and_size():
    table = Table(make_profile([(1, 2, 4), (3, 5, 9), (6, 8, 10)]))
    assert [table.most_accurate(0, ms) for ms in (0.5, 1, 5.9, 6)] == [-1, 0, 1, 2]
    assert [table.largest_batch(1, ms) for ms in (2, 3, 8, 9)] == [-1, 0, 1, 2]
    assert [table.above(floor) for floor in (0.0, 0.505, 0.51, 0.9)] == [0, 1, 1, 2]


@pytest.mark.parametrize("name", ["slackfit", "max-acc"])
def test_a_policy_for_several_profiles_decides_by_the_profile_that_it_is_passed(name):
    fast, slow = PAPER, SLOWED
    both = policies.create(name, fast, slow)
    for profile in (fast, slow, dataclasses.replace(slow)):
        for slack_ms in (12.0, 30.0):
            alone = policies.create(name, profile)
            assert choose(both, profile, slack_ms) == choose(alone, profile, slack_ms)
    assert both.name == name
    other = PAPER.scaled(3.0)  # the profile of a worker that is added later
    assert choose(both, other, 30.0) == choose(policies.create(name, other), other, 30.0)
