"""The project's main invariant: sliced == bucketed == masked == the plain network with its own small weights."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from plain import whole_space
from tiny import CONFIGS, TINY_BERT, TINY_VIT, assert_close, random_images, random_params, random_statistics, random_tokens

from superserve_jax.supernets import programs
from superserve_jax.training.sampling import Sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(params=[*CONFIGS, "transformer", "vit"])
def config(request):
    return {**CONFIGS, "transformer": TINY_BERT, "vit": TINY_VIT}[request.param]


@pytest.fixture
def params(config):
    return random_params(config)


@pytest.fixture
def inputs(config):
    return random_tokens(config) if config == TINY_BERT else random_images(config, 3)


def test_the_plain_network_with_small_weights_agrees_over_the_whole_space_in_one_trace(config, params, inputs):
    masked, traces = programs.masked(config), []

    @jax.jit
    def run(*arguments):
        traces.append(1)
        return masked.infer(*arguments)

    for subnet in whole_space(config):
        statistics = random_statistics(config, subnet)
        expected = plain.network(config, params, subnet, inputs, statistics)
        sliced = programs.sliced(config, subnet)
        assert_close(sliced.infer(params, inputs, statistics, sliced.active(subnet)), expected)
        assert_close(run(params, inputs, masked.pad_statistics(statistics, subnet), masked.active(subnet)), expected)
    assert len(traces) == 1


def test_a_subnet_bucket_runs_each_of_its_members_as_the_plain_network(config, params, inputs):
    for k in range(4):
        members = whole_space(config)[7 * k :: 31]
        program = programs.bucketed(config, members)
        run = jax.jit(program.infer)
        for subnet in members:
            statistics = random_statistics(config, subnet)
            expected = plain.network(config, params, subnet, inputs, statistics)
            assert_close(run(params, inputs, program.pad_statistics(statistics, subnet), program.active(subnet)), expected)


def test_the_sampler_s_buckets_train_each_member_as_the_sliced_program_does(config, params, inputs):
    sampler = Sampler(config, buckets=3, random_subnets=1, seed=0)
    runs = {p: jax.jit(p.train) for p in sampler.buckets}
    for k in range(20):
        choice = sampler.step(k)[2]
        logits, statistics = runs[choice.program](params, inputs, choice.program.active(choice.subnet))
        sliced = programs.sliced(config, choice.subnet)
        expected, expected_statistics = sliced.train(params, inputs, sliced.active(choice.subnet))
        assert_close(logits, expected)
        assert_close(choice.program.cut_statistics(np.asarray(statistics), choice.subnet), expected_statistics)


def test_gradients_of_the_masked_program_equal_the_gradients_of_the_sliced_one(config, params, inputs):
    masked = programs.masked(config)

    def loss(program, params, active):
        return jnp.sum(jnp.square(program.train(params, inputs, active)[0]))

    run = jax.jit(jax.grad(lambda p, a: loss(masked, p, a)))
    for subnet in whole_space(config)[:: len(whole_space(config)) // 3]:
        sliced = programs.sliced(config, subnet)
        expected = jax.jit(jax.grad(lambda p, s=sliced: loss(s, p, s.active(s.envelope))))(params)
        actual = run(params, masked.active(subnet))
        largest = max(np.abs(g).max() for g in expected.values())
        for name, gradient in expected.items():
            np.testing.assert_allclose(actual[name], gradient, rtol=0, atol=1e-4 * largest, err_msg=name)


def test_a_bucket_of_one_subnet_masks_nothing(config):
    subnet = config.space().sample(0, 0)
    assert programs.bucketed(config, [subnet]) == programs.sliced(config, subnet)
