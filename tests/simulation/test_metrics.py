import math

import numpy as np
import pytest
from numpy import testing

from superserve_jax import errors
from superserve_jax.simulation import metrics

# Four queries with an SLO of 1 s: in time, late, never answered, in time.
ARRIVAL = np.array([10.0, 10.5, 11.0, 13.0])
DEADLINE = ARRIVAL + 1
FINISH = np.array([10.25, 12.5, math.inf, 14.0])
ACCURACY = np.array([0.7, 0.9, 0.0, 0.8])
BATCH = np.array([2, 4, 0, 1])


def test_the_summary_of_an_example_worked_out_by_hand():
    s = metrics.summary(ARRIVAL, DEADLINE, FINISH, ACCURACY)
    assert (s.queries, s.attainment) == (4, 0.5)  # late and unanswered queries are misses
    assert s.accuracy == pytest.approx(0.75)  # the mean over queries that met their deadline
    assert (s.p50_ms, s.p99_ms) == pytest.approx((1000.0, 1000 + 0.98 * 1000))  # of the answered queries
    assert (s.throughput_qps, s.goodput_qps) == pytest.approx((3 / 4, 2 / 4))


def test_a_run_without_any_answer_has_no_latency_and_no_throughput():
    s = metrics.summary(*np.array([[0.0], [1.0], [math.inf], [0.0]]))
    assert (s.attainment, s.throughput_qps, s.goodput_qps) == (0.0, 0.0, 0.0)
    assert all(map(math.isnan, (s.accuracy, s.p50_ms, s.p99_ms)))


def test_a_series_describes_the_arrivals_of_each_window():
    s = metrics.series(ARRIVAL, DEADLINE, FINISH, ACCURACY, BATCH, window_s=1.0)
    testing.assert_allclose(s.time_s, [10.5, 11.5, 12.5, 13.5])
    testing.assert_allclose(s.rate_qps, [2, 1, 0, 1])
    testing.assert_allclose(s.attainment, [0.5, 0, math.nan, 1])
    testing.assert_allclose(s.accuracy, [0.7, math.nan, math.nan, 0.8])
    testing.assert_allclose(s.batch, [3, math.nan, math.nan, 1])


def test_windows_weighted_by_their_arrivals_average_to_the_summary():
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(0.01, 500))
    finish = arrival + rng.exponential(0.03, 500)
    accuracy = rng.uniform(0.7, 0.8, 500)
    whole = metrics.summary(arrival, arrival + 0.036, finish, accuracy)
    s = metrics.series(arrival, arrival + 0.036, finish, accuracy, np.ones(500), window_s=0.25)
    assert np.average(s.attainment, weights=s.rate_qps) == pytest.approx(whole.attainment)
    assert np.average(s.accuracy, weights=s.rate_qps * s.attainment) == pytest.approx(whole.accuracy)


def test_no_queries_are_refused():
    with pytest.raises(errors.DataError, match="no queries to summarise; submit at least one"):
        metrics.summary(*np.zeros((4, 0)))
