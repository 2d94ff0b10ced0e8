import dataclasses

import pytest
from tiny import TINY

from superserve_jax import errors
from superserve_jax.families import ofa_resnet
from superserve_jax.families.ofa_resnet import OFAResNetConfig


def test_the_default_config_is_the_published_ofa_resnet50():
    config = OFAResNetConfig()
    space = config.space()
    assert config.num_params(space.largest()) == 48_105_992
    assert space.size == 2 * 117**3 * 1053 * 3**6
    assert len(space.axes[0].choices) == 18
    assert 0.9e9 < config.flops(space.smallest()) < 1.0e9
    assert 7.4e9 < config.flops(space.largest()) < 7.6e9


def test_channels_are_made_divisible_as_once_for_all_does():
    made = {v: ofa_resnet.make_divisible(v, 8) for v in (1, 8.8, 8.9, 11.9, 12, 41.6, 51.2, 19, 20)}
    assert made == {1: 8, 8.8: 8, 8.9: 16, 11.9: 16, 12: 16, 41.6: 40, 51.2: 48, 19: 24, 20: 24}


def test_a_stage_that_may_be_skipped_has_the_width_of_the_stage_before_it():
    space = TINY.space()
    assert len(space.axes[1].choices) == 3
    sizes = TINY.sizes(space.subnet(width=(1.0, 0.5, 1.0)))
    assert sizes["stem.out"] == sizes["stage0.out"] == 4


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
        ({"block": "bottelneck"}, "did you mean 'bottleneck'"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError), match=message):
        dataclasses.replace(TINY, **changes)
