"""Policies in general, the paper's policies, and the planner. test_slackfit.py is about the default policy."""

import dataclasses
import math
import types

import numpy as np
import pytest
import scipy.optimize
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


@pytest.mark.parametrize(("buckets", "trades"), [(4, False), (6, False), (8, False), (10, True), (32, True)])
def test_with_8_latency_buckets_the_papers_rule_never_trades_batch_size_for_accuracy_on_its_profile(buckets, trades):
    # The paper's property P3: in the time in which a small subnet runs a large batch, a large subnet runs a small batch.
    # A rule trades one for the other if some slack gives a more accurate subnet with a smaller batch than another slack.
    policy = PaperSlackFit(PAPER, buckets=buckets)
    chosen = {choose(policy, PAPER, float(ms)) for ms in np.arange(1, 36, 0.05)}
    assert trades == any(rank > other and batch < size for rank, batch in chosen for other, size in chosen)


def test_the_two_readings_differ_if_a_latency_bucket_has_only_small_batches():
    # The third of four latency buckets, 6.5 to 9.25 ms, holds (1, 1) and (1, 2). With "cumulative" it also holds (0, 4).
    profile = make_profile([(1, 2, 4), (7, 9, 12)], batch_sizes=(1, 2, 4))
    in_range = PaperSlackFit(profile, buckets=4)
    cumulative = PaperSlackFit(profile, buckets=4, cumulative=True)
    assert choose(in_range, profile, 9.5) == (1, 2)
    assert choose(cumulative, profile, 9.5) == (0, 4)


@settings(deadline=None)
@given(data=st.data())
def test_a_policy_is_a_pure_function_from_the_state_to_a_subnet_and_a_batch_of_the_profile(data):
    state = data.draw(states(PAPER))
    for name in NAMES:
        policy = policies.create(name, PAPER)
        decision = policy(PAPER, state)
        assert decision == policy(PAPER, state) == policies.create(name, PAPER)(PAPER, state)
        assert PAPER.row(decision.subnet)
        assert 1 <= decision.batch <= PAPER.max_batch


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


@settings(deadline=None, max_examples=50)
@given(share=st.floats(0.05, 0.95), workers=st.integers(1, 12))
def test_a_plan_gives_every_worker_a_subnet_and_carries_the_forecast_if_the_fastest_subnet_could(share, workers):
    policy, fastest = Planner(PAPER, headroom=0.0), PAPER.throughput_qps(PAPER.rows[0].subnet)
    plan = policy.plan(share * workers * fastest, workers=workers, slo_ms=1e6)
    assert len(plan) == workers
    assert sum(map(PAPER.throughput_qps, plan)) >= share * workers * fastest * (1 - 1e-3)


def test_a_plan_takes_the_most_accurate_subnets_that_carry_the_forecast():
    best, fast = PAPER.rows[-1].subnet, PAPER.rows[0].subnet
    policy = Planner(PAPER, headroom=0.0)
    assert policy.plan(1.0, workers=2, slo_ms=1e6) == (best, best)
    assert policy.plan(1e6, workers=2, slo_ms=1e6) == policy.plan(10.0, workers=2, slo_ms=0.1) == (fast, fast)


def test_the_planner_keeps_a_plan_for_its_period_and_makes_another_when_a_worker_leaves():
    policy = Planner(PAPER, period_s=5.0)
    lowest = PAPER.rows[0].accuracy

    def at(now_s, rate_qps, workers=2):
        state = State(now_s, 36.0, 16, workers=workers, rate_qps=rate_qps, slo_ms=36.0)
        return PAPER.row(policy(PAPER, state).subnet).accuracy

    assert at(0.0, 0.0) == lowest  # the rate is unknown
    assert at(0.1, 10.0) == at(1.0, 9000.0) > lowest  # the first plan lasts a second
    assert at(1.2, 9000.0) == at(6.1, 10.0) == lowest
    assert at(6.3, 10.0) > lowest
    assert at(6.4, 4000.0) > at(6.5, 4000.0, workers=1) == lowest


def test_a_planner_rounds_a_fractional_number_of_workers():
    planner = Planner(PAPER)
    options = {"rate_qps": 2000.0, "slo_ms": 36.0}
    whole, parts = (State(0.0, 30.0, 9, (), workers, **options) for workers in (3, 2.7))
    assert planner(PAPER, whole) == Planner(PAPER)(PAPER, parts)


def found(x, message="nothing"):
    return types.SimpleNamespace(x=None if x is None else np.array(x, float), message=message)


NOTHING = {
    "infeasible": lambda *a, **k: found(None, "The problem is infeasible."),
    "raises": lambda *a, **k: 1 / 0,
    "not a number": lambda c, **k: found(np.full(len(c), math.nan)),
    "infinite": lambda c, **k: found(np.full(len(c), math.inf)),
    "too few workers": lambda c, **k: found(np.zeros(len(c))),
    "negative": lambda c, **k: found([*np.zeros(len(c) - 2), -1.0, 4.0]),
    "another shape": lambda c, **k: found([[1.0]]),
    "out of time": lambda c, options, **k: scipy.optimize.OptimizeResult(
        x=None, message=f"Time limit of {options['time_limit']:g} s reached."
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_without_a_plan_of_the_solver_all_workers_run_the_fastest_subnet_and_the_reason_says_so(monkeypatch, name):
    fast = PAPER.rows[0].subnet
    policy, state = Planner(PAPER), State(0.0, 36.0, 16, workers=3, rate_qps=10.0, slo_ms=36.0)
    with monkeypatch.context() as patch:
        patch.setattr(scipy.optimize, "milp", NOTHING[name])
        assert policy.plan(10.0, workers=3, slo_ms=36.0) == (fast,) * 3
        decisions = [policy(PAPER, state._replace(worker=i, now_s=0.1 * i)) for i in range(3)]
    assert {(d.subnet, d.reason) for d in decisions} == {(fast, "unplanned")}
    assert "unplanned" in policies.REASONS
    assert policy.failure
    later = policy(PAPER, state._replace(now_s=20.0))  # the next plan
    assert (later.reason, policy.failure) == ("slack", "")
    assert PAPER.row(later.subnet).accuracy > PAPER.rows[0].accuracy


@pytest.mark.parametrize("rate_qps", [math.nan, math.inf, -1.0])
def test_a_rate_that_cannot_be_still_gives_a_plan(rate_qps):
    assert len(Planner(PAPER).plan(rate_qps, workers=2, slo_ms=36.0)) == 2


def test_the_solver_has_a_time_limit(monkeypatch):
    limits = []
    monkeypatch.setattr(scipy.optimize, "milp", lambda *a, options, **k: limits.append(options["time_limit"]))
    Planner(PAPER).plan(10.0, workers=2, slo_ms=36.0)
    assert limits == [1.0]
