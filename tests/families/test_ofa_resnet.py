import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiny import CONFIGS, TINY

from superserve_jax import errors
from superserve_jax.families import ofa_resnet
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import checking, programs

PUBLISHED = OFAResNetConfig()


def traced(config, subnet):
    """The jaxpr of the sliced program. Its counts do not depend on the family's own formulas."""
    program = programs.sliced(config, subnet)
    statistics = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    active = jax.ShapeDtypeStruct((0,), jnp.int32)
    spec = programs.param_spec(config)
    return jax.make_jaxpr(program.infer)(spec, config.input_spec(1), statistics, active)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_flops_count_every_convolution_of_the_traced_program(name):
    config = CONFIGS[name]
    for subnet in list(config.space().enumerate())[::11]:
        assert config.flops(subnet) == checking.multiply_adds(traced(config, subnet))


def test_xla_counts_the_same_flops_convolution_by_convolution():
    # XLA does not count products with padding. So the inputs are padded beforehand.
    for equation in traced(TINY, TINY.space().largest()).eqns:
        if equation.primitive.name != "conv_general_dilated":
            continue
        x, kernel = (v.aval for v in equation.invars)
        (top, bottom), (left, right) = equation.params["padding"]
        padded = (x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right, x.shape[3])
        strides = equation.params["window_strides"]

        def conv(x, k, strides=strides):
            return lax.conv_general_dilated(x, k, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        arguments = jax.ShapeDtypeStruct(padded, x.dtype), kernel
        counted = checking.multiply_adds(jax.make_jaxpr(conv)(*arguments))
        assert jax.jit(conv).lower(*arguments).compile().cost_analysis()["flops"] == 2 * counted


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_count_the_weights_that_the_subnet_needs_on_its_own(name):
    config = CONFIGS[name]
    largest = sum(int(np.prod(s.shape)) for s in programs.param_spec(config).values())
    assert config.num_params(config.space().largest()) == largest
    for subnet in list(config.space().enumerate())[::11]:
        leaves = programs.used_leaves(programs.sliced(config, subnet))
        assert config.num_params(subnet) == sum(math.prod(shape) for shape in leaves.values())


def test_the_default_config_is_the_published_ofa_resnet50():
    space = PUBLISHED.space()
    assert PUBLISHED.num_params(space.largest()) == 48_105_992
    assert sum(int(np.prod(s.shape)) for s in programs.param_spec(PUBLISHED).values()) == 48_105_992
    assert space.size == 2 * 117**3 * 1053 * 3**6
    assert len(space.axes[0].choices) == 18
    assert 0.9e9 < PUBLISHED.flops(space.smallest()) < 1.0e9
    assert 7.4e9 < PUBLISHED.flops(space.largest()) < 7.6e9


def test_channels_are_made_divisible_as_once_for_all_does():
    made = {v: ofa_resnet.make_divisible(v, 8) for v in (1, 8.8, 8.9, 11.9, 12, 41.6, 51.2, 19, 20)}
    assert made == {1: 8, 8.8: 8, 8.9: 16, 11.9: 16, 12: 16, 41.6: 40, 51.2: 48, 19: 24, 20: 24}


def test_a_stage_that_may_be_skipped_has_the_width_of_the_stage_before_it():
    space = TINY.space()
    assert len(space.axes[1].choices) == 3
    sizes = TINY.sizes(space.subnet(width=(1.0, 0.5, 1.0)))
    assert sizes["stem.out"] == sizes["stage0.out"] == 4


def test_average_pooling_averages_only_pixels_inside_the_image():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    pooled = ofa_resnet.average_pool(x, 2)[0, :, :, 0]
    assert pooled.shape == (3, 3)
    assert pooled[2, 2] == 24.0
    assert pooled[0, 0] == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number from 1 up"),
        ({"image_size": -1}, "image_size"),
        ({"expand_ratios": ()}, "expand_ratios must be positive"),
        ({"width_mults": (float("nan"),)}, "width_mults must be positive"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
        ({"mean": (0.1, 0.2)}, "one per channel"),
        ({"stem_depths": (0,)}, "stem_depths"),
        ({"strides": (1,)}, "one value per stage"),
        ({"strides": (2, 2)}, "stage 0 may have depth 0 only if it keeps the shape"),
        ({"depths": ((1, 0), (1, 2))}, "ascending"),
        ({"expand_ratios": (1.0, 0.5)}, "ascending"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        dataclasses.replace(TINY, **changes)


def test_a_mistyped_block_gets_the_nearest_suggested():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'bottleneck'"):
        dataclasses.replace(TINY, block="bottelneck")
