import numpy as np
import pytest
from tiny import TINY, random_params

from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import latency
from superserve_jax.training.latency import Predictor


def test_every_subnet_asked_for_is_timed_in_positive_milliseconds():
    model = SuperNet(TINY, random_params(TINY))
    chosen = [TINY.space().smallest(), TINY.space().largest()]
    found = latency.measure(model, chosen, batch=2, repeats=3)
    assert list(found) == chosen
    assert all(ms > 0 for ms in found.values())


def test_the_subnets_to_time_begin_with_smallest_and_largest_and_none_occurs_twice():
    chosen = latency.spread(TINY, 20, seed=1)
    assert chosen[:2] == [TINY.space().smallest(), TINY.space().largest()]
    assert 10 < len(chosen) == len(set(chosen)) <= 20
    assert chosen == latency.spread(TINY, 20, seed=1)


def linear_ms(subnet):
    """An invented latency that is linear in the predictor's features."""
    return 0.1 + 2e-6 * TINY.flops(subnet) + 0.3 * sum(subnet.gates)


def test_the_predictor_learns_a_latency_that_is_a_sum_over_layers():
    measured = {s: linear_ms(s) for s in latency.spread(TINY, 40, seed=0)}
    predictor = Predictor(TINY, measured)
    assert predictor.error < 0.01
    for k in range(20):
        subnet = TINY.space().sample(7, k)
        assert predictor(subnet) == pytest.approx(linear_ms(subnet), rel=0.03)


def test_the_predictor_reports_noise_as_error_and_predicts_nothing_below_the_fastest():
    rng = np.random.default_rng(0)
    measured = {s: linear_ms(s) * rng.uniform(0.5, 1.5) for s in latency.spread(TINY, 40, seed=0)}
    predictor = Predictor(TINY, measured)
    assert 0.1 < predictor.error < 0.6
    assert predictor(TINY.space().smallest()) >= min(measured.values())
