import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.simulation import traces
from superserve_jax.simulation.traces import Trace

MAKERS = {
    "bursty": lambda seed: traces.bursty(duration_s=2.0, seed=seed),
    "gamma": lambda seed: traces.gamma(rate_qps=2000.0, cv2=4.0, duration_s=2.0, seed=seed),
    "accelerating": lambda seed: traces.accelerating(ramp_at_s=0.5, duration_s=2.0, seed=seed),
    "steps": lambda seed: traces.steps(rates_qps=(1000.0, 0.0, 3000.0), step_s=0.5, seed=seed),
    "mixed": lambda seed: traces.bursty(duration_s=2.0).mixed(slo_ms={20: 1, 50: 1}, floors={0.0: 3, 0.8: 1}, seed=seed),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_trace_is_a_pure_function_of_its_arguments_and_the_seed(make):
    a, b, other = make(1), make(1), make(2)
    for what in ("arrivals_s", "slo_ms", "floors"):
        np.testing.assert_array_equal(getattr(a, what), getattr(b, what))
    different = [not np.array_equal(getattr(a, what), getattr(other, what)) for what in ("arrivals_s", "slo_ms", "floors")]
    assert any(different)


def test_clients_that_send_groups_keep_the_number_of_queries_and_their_slos():
    trace = traces.gamma(rate_qps=100.0, duration_s=1.0, seed=3).mixed(slo_ms={20: 1, 50: 1})
    grouped = trace.in_groups(8)
    whole = len(trace) // 8 * 8
    np.testing.assert_array_equal(grouped.arrivals_s[:whole], np.repeat(trace.arrivals_s[7::8], 8))
    np.testing.assert_array_equal(grouped.arrivals_s[whole:], trace.arrivals_s[-1])
    np.testing.assert_array_equal(grouped.slo_ms, trace.slo_ms)
    with pytest.raises(errors.ConfigError, match="whole number of queries from 1 up, got 0"):
        trace.in_groups(0)


@settings(deadline=None)
@given(rate=st.floats(50.0, 5000.0), cv2=st.floats(0.0, 10.0), seed=st.integers(0, 99))
def test_arrivals_are_ascending_and_within_the_duration(rate, cv2, seed):
    for trace in (
        traces.gamma(rate_qps=rate, cv2=cv2, duration_s=1.5, seed=seed),
        traces.accelerating(from_qps=rate, to_qps=2 * rate, ramp_at_s=0.5, cv2=cv2, duration_s=1.5, seed=seed),
        traces.bursty(base_qps=rate, burst_qps=rate, cv2=cv2, duration_s=1.5, seed=seed),
    ):
        assert trace.arrivals_s.dtype == np.float64
        assert (np.diff(trace.arrivals_s) >= 0).all()
        assert ((trace.arrivals_s > 0) & (trace.arrivals_s <= 1.5 + 1e-9)).all()


@pytest.mark.parametrize("cv2", [0.5, 1.0, 8.0])
def test_gamma_gaps_have_the_given_rate_and_squared_coefficient_of_variation(cv2):
    gaps = np.diff(traces.gamma(rate_qps=5000.0, cv2=cv2, duration_s=60.0).arrivals_s)
    assert 1 / gaps.mean() == pytest.approx(5000.0, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.05)


def test_without_variation_arrivals_are_evenly_spaced():
    np.testing.assert_allclose(traces.gamma(rate_qps=4.0, cv2=0, duration_s=1.0).arrivals_s, [0.25, 0.5, 0.75, 1.0])


def test_bursty_traffic_is_an_even_base_with_bursts_on_top():
    trace = traces.bursty(base_qps=10.0, burst_qps=1000.0, duration_s=30.0)
    assert np.isin(np.arange(1, 301) / 10.0, trace.arrivals_s).all()
    assert trace.mean_qps == pytest.approx(1010.0, rel=0.1)
    assert len(traces.bursty(base_qps=0.0, burst_qps=1000.0, duration_s=30.0)) == len(trace) - 300


def test_accelerating_traffic_is_constant_then_a_ramp_then_constant():
    trace = traces.accelerating(from_qps=1000.0, to_qps=3000.0, qps_per_s=500.0, ramp_at_s=2.0, duration_s=10.0, cv2=0)
    counts = np.histogram(trace.arrivals_s, bins=[0, 2, 4, 6, 10])[0]
    np.testing.assert_allclose(counts, [2000, 2 * 1500, 2 * 2500, 12000], atol=2)


def test_steps_leave_a_gap_where_the_rate_is_zero():
    arrivals = traces.steps(rates_qps=(100.0, 0.0, 200.0), step_s=1.0).arrivals_s
    assert not ((arrivals > 1.0) & (arrivals < 2.0)).any()
    assert (arrivals > 2.0).sum() > 100


def test_a_mix_draws_values_in_their_shares():
    trace = traces.bursty(duration_s=5.0).mixed(slo_ms={20.0: 3, 100.0: 1}, floors={0.0: 1, 0.79: 1}, lengths={20: 3, 100: 1})
    assert (trace.slo_ms == 20.0).mean() == pytest.approx(0.75, abs=0.02)
    assert (trace.floors == 0.79).mean() == pytest.approx(0.5, abs=0.02)
    assert (trace.lengths == 20).mean() == pytest.approx(0.75, abs=0.02)
    np.testing.assert_allclose(trace.deadlines_s, trace.arrivals_s + trace.slo_ms / 1e3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: traces.bursty(burst_qps=float("nan")), "burst_qps"),
        (lambda: traces.bursty(base_qps=-1.0), "base_qps"),
        (lambda: traces.bursty(cv2=-1.0), "cv2"),
        (lambda: traces.gamma(rate_qps=0.0), "rate_qps"),
        (lambda: traces.gamma(rate_qps=1.0, duration_s=float("inf")), "duration_s"),
        (lambda: traces.steps(rates_qps=(), step_s=1.0), "rates_qps"),
        (lambda: traces.steps(rates_qps=(1.0, -1.0), step_s=1.0), "rates_qps"),
        (lambda: traces.accelerating(qps_per_s=0.0), "qps_per_s"),
        (lambda: Trace(np.array([2.0, 1.0])), "ascending"),
        (lambda: Trace(np.array([1.0]), slo_ms=np.array([1.0, 2.0])), "one per query"),
        (lambda: Trace(np.array([1.0]), floors=1.5), "floors"),
        *((lambda n=n: Trace(np.array([1.0]), lengths=n), "lengths") for n in (-1, 2.5, np.array([1, 2]))),
        (lambda: traces.gamma(rate_qps=9.0).mixed(slo_ms={}), "shares"),
        (lambda: traces.gamma(rate_qps=9.0).mixed(slo_ms={20.0: -1.0}), "shares"),
    ],
)
def test_parameters_that_cannot_work_are_refused_by_name(make, message):
    with pytest.raises(errors.ConfigError, match=message):
        make()


@pytest.mark.parametrize("slo_ms", [0.0, -1.0, float("nan"), float("inf")])
def test_an_slo_that_is_not_positive_and_finite_is_refused(slo_ms):
    with pytest.raises(errors.DeadlineError):
        traces.gamma(rate_qps=9.0, slo_ms=slo_ms)
