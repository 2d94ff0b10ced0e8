"""The project's main invariant: sliced == bucketed == masked == the plain network with its own small weights."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from tiny import CONFIGS, TINY, random_images, random_params, random_statistics

from superserve_jax.subnet import envelope_of
from superserve_jax.supernets import programs
from superserve_jax.training.sampling import Sampler

TOLERANCE = 1e-5  # relative to the largest output


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(np.asarray(expected)).max())


def test_the_plain_network_with_small_weights_agrees_over_the_whole_space(config):
    params, images = random_params(config), random_images(config, 3)
    masked = programs.masked(config)
    run = jax.jit(masked.infer)
    for subnet in config.space().enumerate():
        statistics = random_statistics(config, subnet)
        expected = plain.ofa_resnet(config, params, subnet, images, statistics)
        sliced = programs.sliced(config, subnet)
        assert_close(sliced.infer(params, images, statistics, sliced.active(subnet)), expected)
        assert_close(run(params, images, masked.pad_statistics(statistics, subnet), masked.active(subnet)), expected)


def test_training_outputs_and_statistics_agree_over_the_whole_space(config):
    params, images = random_params(config), random_images(config, 4)
    masked = programs.masked(config)
    run = jax.jit(masked.train)
    for i, subnet in enumerate(config.space().enumerate()):
        if i % 5:
            continue
        sliced = programs.sliced(config, subnet)
        logits, statistics = sliced.train(params, images, sliced.active(subnet))
        masked_logits, masked_statistics = run(params, images, masked.active(subnet))
        assert_close(masked_logits, logits)
        assert_close(masked.cut_statistics(np.asarray(masked_statistics), subnet), statistics)


def test_a_subnet_bucket_runs_each_of_its_members_as_the_masked_program_does(config):
    params, images = random_params(config), random_images(config, 3)
    space = config.space()
    masked = programs.masked(config)
    run_masked = jax.jit(masked.infer)
    members = [space.sample(0, k) for k in range(40)]
    for k in range(3):
        program = programs.bucketed(config, members[8 * k : 8 * k + 8])
        run = jax.jit(program.infer)
        for subnet in members[8 * k : 8 * k + 8]:
            statistics = random_statistics(config, subnet)
            expected = run_masked(params, images, masked.pad_statistics(statistics, subnet), masked.active(subnet))
            assert_close(run(params, images, program.pad_statistics(statistics, subnet), program.active(subnet)), expected)


def test_the_sampler_s_buckets_train_each_member_as_the_sliced_program_does(config):
    params, images = random_params(config), random_images(config, 3)
    sampler = Sampler(config, buckets=3, random_subnets=1, seed=0)
    runs = {p: jax.jit(p.train) for p in sampler.buckets}
    for k in range(30):
        choice = sampler.step(k)[2]
        logits, statistics = runs[choice.program](params, images, choice.program.active(choice.subnet))
        sliced = programs.sliced(config, choice.subnet)
        expected, expected_statistics = sliced.train(params, images, sliced.active(choice.subnet))
        assert_close(logits, expected)
        assert_close(choice.program.cut_statistics(np.asarray(statistics), choice.subnet), expected_statistics)


def test_gradients_of_the_masked_program_equal_the_gradients_of_the_sliced_one(config):
    params, images = random_params(config), random_images(config, 4)
    masked = programs.masked(config)

    def loss(program, params, active):
        return jnp.sum(jnp.square(program.train(params, images, active)[0]))

    run = jax.jit(jax.grad(lambda p, a: loss(masked, p, a)))
    for k in range(4):
        subnet = config.space().sample(5, k)
        sliced = programs.sliced(config, subnet)
        expected = jax.grad(lambda p, s=sliced: loss(s, p, s.active(s.envelope)))(params)
        actual = run(params, masked.active(subnet))
        largest = max(np.abs(g).max() for g in expected.values())
        for name, gradient in expected.items():
            np.testing.assert_allclose(actual[name], gradient, rtol=0, atol=1e-4 * largest, err_msg=name)


def test_a_bucket_of_one_subnet_masks_nothing(config):
    subnet = config.space().sample(0, 0)
    assert programs.bucketed(config, [subnet]) == programs.sliced(config, subnet)


def test_statistics_survive_padding_and_cutting(config):
    masked = programs.masked(config)
    for subnet in list(config.space().enumerate())[::7]:
        statistics = random_statistics(config, subnet)
        np.testing.assert_array_equal(masked.cut_statistics(masked.pad_statistics(statistics, subnet), subnet), statistics)


def test_the_masked_program_is_traced_once_for_all_subnets():
    masked = programs.masked(TINY)
    traces = []

    def counted(params, images, statistics, active):
        traces.append(1)
        return masked.infer(params, images, statistics, active)

    run, params, images = jax.jit(counted), random_params(TINY), random_images(TINY, 2)
    for subnet in TINY.space().enumerate():
        run(params, images, masked.pad_statistics(random_statistics(TINY, subnet), subnet), masked.active(subnet))
    assert len(traces) == 1


def test_a_program_reads_only_the_parameters_of_blocks_it_keeps():
    space = TINY.space()
    small = programs.sliced(TINY, space.smallest())
    params = {k: v for k, v in random_params(TINY).items() if not k.startswith(("blocks.0.", "blocks.2.", "stem.1."))}
    statistics = random_statistics(TINY, space.smallest())
    assert small.infer(params, random_images(TINY, 1), statistics, jnp.zeros((0,), jnp.int32)).shape == (1, 3)


def test_limits_of_an_envelope_hold_every_member(config):
    space = config.space()
    members = [space.sample(1, k) for k in range(50)]
    limits = config.sizes(envelope_of(members))
    assert all(size <= limits[name] for m in members for name, size in config.sizes(m).items())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_have_the_shapes_of_the_spec(name):
    config = CONFIGS[name]
    made, spec = programs.initial_params(config, 0), programs.param_spec(config)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in spec.items()}
