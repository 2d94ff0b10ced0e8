import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax import profile as profile_lib
from superserve_jax.serving import bounds, reference, simulator, traces
from superserve_jax.subnet import Subnet

PAPER = reference.paper_profile()
# 100 and 25 queries/s and worker, at batch 1.
TWO = profile_lib.Profile((1,), (profile_lib.Row(Subnet((1, 0)), 0.7, (10.0,)), profile_lib.Row(Subnet((1, 1)), 0.8, (40.0,))))


def test_the_fluid_bound_mixes_two_subnets_so_that_the_workers_just_carry_the_rate():
    # Half of 40 queries/s at 10 ms and half at 40 ms keep one worker busy for 20 * 0.01 + 20 * 0.04 = 1 s.
    bound = bounds.fluid(TWO, 40.0, workers=1, slo_ms=50.0)
    assert (bound.attainment, bound.accuracy) == (pytest.approx(1.0), pytest.approx(0.75))


def test_a_low_rate_is_bounded_by_the_best_subnet_and_one_beyond_capacity_by_the_fastest():
    low, beyond = (bounds.fluid(TWO, rate, workers=1, slo_ms=50.0) for rate in (20.0, 400.0))
    assert (low.attainment, low.accuracy) == (pytest.approx(1.0), pytest.approx(0.8))
    assert (beyond.attainment, beyond.accuracy) == (pytest.approx(0.25), pytest.approx(0.7))


def test_a_subnet_that_is_slower_than_the_slo_does_not_count():
    assert bounds.fluid(TWO, 20.0, workers=1, slo_ms=39.0).accuracy == pytest.approx(0.7)
    hopeless = bounds.fluid(TWO, 20.0, workers=1, slo_ms=9.0)
    assert (hopeless.attainment, math.isnan(hopeless.accuracy)) == (0.0, True)


def test_a_floor_spends_the_workers_on_the_queries_that_have_it():
    arrivals = np.arange(1, 41) / 40
    floored = traces.Trace(arrivals, 50.0, np.where(np.arange(40) % 4, 0.0, 0.8))
    bound = bounds.fluid_of_trace(TWO, floored, workers=1)
    assert (bound.attainment, bound.accuracy) == (pytest.approx(1.0), pytest.approx(0.75))
    # All floored: 25 of 40 can be served.
    assert bounds.fluid_of_trace(TWO, traces.Trace(arrivals, 50.0, 0.8), workers=1).attainment == pytest.approx(25 / 40)


def test_a_trace_of_steady_traffic_has_the_bound_of_its_rate():
    trace = traces.gamma(rate_qps=7050.0, cv2=0)
    of_trace, of_rate = bounds.fluid_of_trace(PAPER.scaled(1.9), trace), bounds.fluid(PAPER.scaled(1.9), 7050.0)
    assert of_trace.accuracy == pytest.approx(of_rate.accuracy, abs=1e-6)


def test_windows_tighten_the_bound_of_traffic_that_changes():
    trace = traces.steps(rates_qps=(1000.0, 8000.0), step_s=5.0)
    loose = bounds.fluid_of_trace(PAPER.scaled(1.9), trace)
    tight = bounds.fluid_of_trace(PAPER.scaled(1.9), trace, window_s=1.0)
    assert tight.accuracy < loose.accuracy - 0.001


@settings(deadline=None, max_examples=15)
@given(
    policy=st.sampled_from(["slackfit", "slackfit-paper", "max-batch", "fixed:2"]),
    burst_qps=st.floats(500.0, 6000.0),
    window_s=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 9),
)
def test_no_policy_beats_the_bound(policy, burst_qps, window_s, seed):
    profile = PAPER.scaled(1.9)
    trace = traces.bursty(burst_qps=burst_qps, cv2=2.0, duration_s=2.0, seed=seed)
    result = simulator.simulate(profile, policy, trace)
    bound = bounds.fluid_of_trace(profile, trace, window_s=window_s or 2.036)
    assert result.attainment <= bound.attainment + 1e-9
    # Compared as the sum over all queries, since a policy may buy accuracy with attainment.
    if bound.attainment > 1 - 1e-6:
        least = PAPER.rows[0].accuracy
        gained = result.attainment * (result.mean_accuracy - least)
        assert gained <= bound.accuracy - least + 1e-6


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(errors.ConfigError, match="rate_qps"):
        bounds.fluid(PAPER, rate)


def test_workers_and_windows_must_be_positive():
    trace = traces.gamma(rate_qps=100.0, duration_s=1.0)
    with pytest.raises(errors.ConfigError, match="workers"):
        bounds.fluid_of_trace(PAPER, trace, workers=0)
    with pytest.raises(errors.ConfigError, match="window_s"):
        bounds.fluid_of_trace(PAPER, trace, window_s=-1.0)


def test_a_trace_without_queries_has_no_accuracy_to_bound():
    bound = bounds.fluid_of_trace(PAPER, traces.Trace(np.zeros(0)))
    assert (bound.attainment, math.isnan(bound.accuracy)) == (1.0, True)
