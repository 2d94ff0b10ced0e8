"""Statistics, accuracies and latencies of the subnets of a SuperNet."""

import numpy as np
import pytest
from tiny import TINY, batches_of, random_images

from superserve_jax import errors
from superserve_jax.supernets import programs
from superserve_jax.training import calibration, evaluation, latency
from superserve_jax.training.latency import Predictor


def test_statistics_of_one_batch_are_what_the_sliced_program_sees(model):
    images = random_images(TINY, 16)
    subnet = TINY.space().sample(0, 1)
    program = programs.sliced(TINY, subnet)
    expected = program.train(model.params, images, program.active(subnet))[1]
    rows = calibration.calibrate(model, [subnet], images)
    np.testing.assert_allclose(rows[subnet], expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_several_batches_are_pooled_exactly_in_the_first_layer(model, monkeypatch):
    # Only the first norm's input does not depend on how the images are batched.
    images, subnet = random_images(TINY, 40), TINY.space().largest()
    whole = calibration.calibrate(model, [subnet], images)[subnet]
    monkeypatch.setattr(calibration, "_BATCH_SIZE", 10)
    parts = calibration.calibrate(model, [subnet], images)[subnet]
    first = TINY.sizes(subnet)["stem.mid"]
    np.testing.assert_allclose(parts[:, :first], whole[:, :first], rtol=1e-4, atol=1e-5)


def test_calibration_leaves_the_model_as_it_was(model):
    calibration.calibrate(model, [TINY.space().largest()], random_images(TINY, 8))
    assert model.statistics == {}


def test_too_few_images_are_refused(model):
    with pytest.raises(errors.ConfigError, match="2 or more"):
        calibration.calibrate(model, [TINY.space().largest()], random_images(TINY, 1))


def test_statistics_that_are_not_finite_are_refused(model):
    model.params["stem.0.conv.kernel"] = np.full_like(model.params["stem.0.conv.kernel"], np.nan)
    with pytest.raises(errors.ConfigError, match="not finite"):
        calibration.calibrate(model, [TINY.space().largest()], random_images(TINY, 8))


def test_accuracy_counts_each_image_once_and_padding_never(model):
    images = random_images(TINY, 23)
    chosen = [TINY.space().smallest(), TINY.space().largest()]
    model.statistics = calibration.calibrate(model, chosen, images)
    labels = np.argmax(np.asarray(model(images, chosen[0])), -1).astype(np.int32)
    labels[:5] = (labels[:5] + 1) % 3
    found = evaluation.accuracy(model, chosen, batches_of(images, labels, 10))
    assert found[0] == pytest.approx(18 / 23)
    other = np.argmax(np.asarray(model(images, chosen[1])), -1)
    assert found[1] == pytest.approx((other == labels).mean())


def test_every_subnet_asked_for_is_timed_in_positive_milliseconds(model):
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
