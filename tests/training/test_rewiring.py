"""Rewiring: the largest subnet computes the same function, and small subnets get the important units."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIGS, TINY_BERT, TINY_VIT, random_images, random_params, random_tokens

from superserve_jax import errors
from superserve_jax.supernets import programs
from superserve_jax.training import losses, rewiring
from superserve_jax.training.config import OptimConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

BERT = dataclasses.replace(TINY_BERT, heads=(1, 2, 4), ffn=(2, 5))
FAMILIES = {"dynabert": BERT, "vit": TINY_VIT, **CONFIGS}


def batches_of(config, count=2, size=6):
    make = random_tokens if config.family == "dynabert" else random_images
    rng = np.random.default_rng(0)
    return [
        {"inputs": make(config, size, seed=k), "label": rng.integers(0, config.num_classes, size).astype(np.int32)}
        for k in range(count)
    ]


def logits_of(config, params, subnet, inputs):
    return np.asarray(_logits(programs.sliced(config, subnet), params, inputs))


@functools.partial(jax.jit, static_argnums=0)
def _logits(program, params, inputs):
    return program.train(params, inputs, jnp.zeros(0, jnp.int32))[0]


def loss_of(config, params, subnet, batches):
    return float(np.mean([losses.cross_entropy(logits_of(config, params, subnet, b["inputs"]), b["label"]) for b in batches]))


def rewire(config, params, batches):
    return rewiring.reorder(config, params, rewiring.orders(config, params, batches))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_order_of_the_units_changes_the_largest_subnet_and_rewiring_changes_a_small_one(family):
    config, rng = FAMILIES[family], np.random.default_rng(0)
    params, batches, space = random_params(config), batches_of(config), config.space()
    inputs = batches[0]["inputs"]
    expected = logits_of(config, params, space.largest(), inputs)
    in_random_order = [rng.permutation(units.count) for units in config.units()]
    assert any((order != np.arange(len(order))).any() for order in in_random_order)
    rewired = rewire(config, params, batches)
    for after in (rewired, rewiring.reorder(config, params, in_random_order)):
        found = logits_of(config, after, space.largest(), inputs)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
        assert {name: p.shape for name, p in after.items()} == {name: p.shape for name, p in params.items()}
    small, after = (logits_of(config, p, space.smallest(), inputs) for p in (params, rewired))
    assert np.abs(after - small).max() > 1e-2


def test_the_importances_after_rewiring_descend():
    batches = batches_of(BERT)
    after = rewire(BERT, random_params(BERT), batches)
    for units, values in zip(BERT.units(), rewiring.importances(BERT, after, batches), strict=True):
        assert (np.diff(values) <= 1e-5 * values.max()).all(), units


def test_an_importance_is_the_change_of_the_loss_without_the_unit():
    """Scaling down the weights that read a unit by a small share changes the loss by that share of its importance."""
    batch = batches_of(BERT, 1)
    params, largest, share = random_params(BERT), BERT.space().largest(), 1e-2
    for units, values in zip(BERT.units(), rewiring.importances(BERT, params, batch), strict=True):
        [(name, axis, _)] = units.readers
        assert axis == 0
        size = params[name].shape[0] // units.count
        for i in (0, units.count - 1):
            change = {}
            for sign in (-1, 1):
                scaled = params[name].copy()
                scaled[i * size : (i + 1) * size] *= 1 + sign * share
                change[sign] = loss_of(BERT, {**params, name: scaled}, largest, batch)
            slope = abs(change[1] - change[-1]) / (2 * share)
            assert slope == pytest.approx(values[i], rel=0.05, abs=1e-3 * values.max() + 1e-4)


@pytest.mark.parametrize("place", [0, 2])
def test_a_useless_head_and_a_useless_neuron_go_last(place):
    params = random_params(BERT)
    head = slice(place * BERT.head_size, (place + 1) * BERT.head_size)
    params["layers.1.attention_out.kernel"][head] = 0  # nobody reads it
    params["layers.1.ffn_in.kernel"][:, place] = 0  # always gelu(0) = 0
    params["layers.1.ffn_in.bias"][place] = 0
    mark = params["layers.1.query.kernel"][:, head].copy()
    after = rewire(BERT, params, batches_of(BERT))
    assert not np.asarray(after["layers.1.attention_out.kernel"])[-BERT.head_size :].any()
    np.testing.assert_array_equal(np.asarray(after["layers.1.query.kernel"])[:, -BERT.head_size :], mark)
    assert not np.asarray(after["layers.1.ffn_in.kernel"])[:, -1].any()
    assert np.asarray(after["layers.1.attention_out.kernel"])[: -BERT.head_size].any()


def test_a_subnet_whose_important_units_stood_last_computes_the_whole_network_after_rewiring():
    """All but the last head and the last two neurons are useless, so that the smallest widths are enough."""
    params = random_params(BERT)
    for i in range(BERT.num_layers):
        params[f"layers.{i}.attention_out.kernel"][: -BERT.head_size] = 0
        params[f"layers.{i}.ffn_out.kernel"][: -BERT.ffn[0]] = 0
    batches, space = batches_of(BERT, size=12), BERT.space()
    narrow, largest = space.subnet(heads=1, ffn=BERT.ffn[0]), space.largest()
    whole = loss_of(BERT, params, largest, batches)
    before = loss_of(BERT, params, narrow, batches)
    after = loss_of(BERT, rewire(BERT, params, batches), narrow, batches)
    assert after == pytest.approx(whole, abs=1e-5)
    assert abs(before - whole) > 1e-2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_state_of_an_optimiser_is_reordered_like_the_parameters(name):
    config, rng = BERT, np.random.default_rng(1)
    orders = [rng.permutation(units.count) for units in config.units()]
    params = random_params(config)
    optimiser = OptimConfig(name=name).create(10)
    state = optimiser.update(params, optimiser.init(params), params)[1]  # the gradients are the parameters themselves
    moved = rewiring.reorder(config, (params, {"state": state}), orders)
    expected = optimiser.update(moved[0], optimiser.init(moved[0]), moved[0])[1]
    assert jax.tree.structure(moved[1]["state"]) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved[1]["state"], expected)
    assert not jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), state, expected))


def test_weights_that_are_not_finite_are_refused():
    params = random_params(BERT)
    params["classifier.bias"][0] = np.nan
    with pytest.raises(errors.ConfigError, match="not finite"):
        rewire(BERT, params, batches_of(BERT))
