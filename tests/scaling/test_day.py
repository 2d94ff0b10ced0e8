"""A simulated day: nodes take minutes to start, a smooth day has no oscillation, and worker-hours are counted."""

import numpy as np
import pytest
from policy_cases import SLOWED

from superserve_jax import errors
from superserve_jax.scaling import what_if
from superserve_jax.scaling.controller import Goal
from superserve_jax.scaling.day import simulate_day
from superserve_jax.simulation import simulator, traces
from superserve_jax.simulation.cluster import Cluster

DAY = 600  # minutes, a short one
QUICK = {"sample_s": 0.1, "slo_ms": 36.0}


def lowest_hour(day):
    return min(what_if.total(day.served[i : i + 60]).accuracy for i in range(0, len(day.served), 60))


def test_a_day_with_a_night_needs_fewer_worker_hours_and_does_not_oscillate():
    hours = 2 * np.pi * np.arange(DAY) / DAY
    jitter = np.exp(0.1 * np.random.default_rng(0).standard_normal(DAY))
    rates = 1500 * (1 - 0.7 * np.cos(hours)) * jitter
    day = simulate_day(SLOWED, rates, Goal(0.77, most=12), **QUICK)
    assert day.turns <= 1  # the fleet grows until noon, and shrinks afterwards
    assert (day.alive.min(), day.alive[:60].max() <= 3) == (1, True)
    noon = int(day.alive.max())
    fixed = simulate_day(SLOWED, rates, Goal(0.77, most=noon, least=noon), **QUICK)
    assert fixed.worker_hours == pytest.approx(DAY / 60 * noon)
    assert day.worker_hours < 0.8 * fixed.worker_hours
    assert lowest_hour(day) > 0.76
    assert min(day.attainment, fixed.attainment) > 0.999


def test_a_new_worker_serves_after_its_start_and_costs_from_its_order_on():
    rates = [200.0] * 10 + [1500.0] * 30
    day = simulate_day(SLOWED, rates, Goal(0.77, most=4, low_s=60.0), start_s=170.0, **QUICK)
    (first, by), *_ = day.changes
    assert by > 0
    assert day.alive[: first + 4].tolist() == [1] * (first + 4)  # three minutes, rounded up
    assert day.alive[first + 4] == 1 + by
    assert day.paid[first + 1] == 1 + by
    assert day.worker_hours == pytest.approx(day.paid.sum() / 60)


def test_minutes_are_simulated_alone_and_weighted_by_their_queries():
    day = simulate_day(SLOWED, [500.0, 0.0, 3000.0], Goal(0.5, most=2, least=2), **QUICK)
    each = [
        simulator.simulate(SLOWED, "slackfit", traces.gamma(rate_qps=rate, duration_s=0.1, seed=minute), cluster=Cluster(2))
        for minute, rate in ((0, 500.0), (2, 3000.0))
    ]
    met = [r.outcome == simulator.MET for r in each]
    assert day.attainment == pytest.approx(np.concatenate(met).mean())
    assert day.accuracy == pytest.approx(np.concatenate([r.accuracy[m] for r, m in zip(each, met, strict=True)]).mean())
    assert day.served[1] == (0, 0, 0.0)


def test_a_day_without_queries():
    day = simulate_day(SLOWED, [0.0] * 90, Goal(0.77, most=4), first=3, **QUICK)
    assert (day.attainment, day.changes[0][1]) == (1.0, -1)
    assert day.alive[-1] < 3
    assert np.isnan(day.accuracy)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rates_qps": [1.0, -1.0]}, "rates from 0 up, one for each minute"),
        ({"rates_qps": 5.0}, "must be a list of rates"),
        ({"first": 0}, "first must be a number of workers from 1 up, got 0"),
        ({"sample_s": 0.0}, "sample_s must be a positive number"),
        ({"start_s": -1.0}, "start_s must be a number from 0"),
    ],
)
def test_an_impossible_day_is_refused(wrong, message):
    with pytest.raises(errors.ConfigError, match=message):
        simulate_day(SLOWED, goal=Goal(0.77, most=4), **{"rates_qps": [1.0], **wrong})
