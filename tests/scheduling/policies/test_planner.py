from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import PAPER

from superserve_jax.scheduling.policies import Planner, State


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
