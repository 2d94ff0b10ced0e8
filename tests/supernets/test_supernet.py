import numpy as np
import pytest
from tiny import TINY, random_images

from superserve_jax import errors, families
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs

SPACE = TINY.space()


def test_shared_statistics_are_cut_from_the_statistics_of_the_largest_subnet(tiny):
    subnet = SPACE.smallest()
    shared, full = tiny.statistics_of(subnet, norm="shared"), tiny.statistics[SPACE.largest()]
    offsets = programs.masked(TINY).offsets
    parts = [full[:, offsets[name] :][:, :n] for name, n in TINY.norm_sizes(TINY.sizes(subnet)).items()]
    np.testing.assert_array_equal(shared, np.concatenate(parts, axis=1))
    assert not np.allclose(tiny(random_images(TINY, 2), subnet), tiny(random_images(TINY, 2), subnet, norm="shared"))


def test_shared_statistics_need_the_statistics_of_the_largest_subnet(tiny):
    del tiny.statistics[SPACE.largest()]
    with pytest.raises(errors.NotCalibratedError, match="the largest subnet has no"):
        tiny(random_images(TINY, 1), SPACE.smallest(), norm="shared")


@pytest.mark.parametrize(
    ("subnet", "norm", "error", "message"),
    [
        (SPACE.subnet(depth=(0, 0, 1), width=0.5, expand=1.0), "own", errors.NotCalibratedError, r"superserve calibrate"),
        (SPACE.largest(), "sharde", errors.UnknownNameError, "did you mean 'shared'"),
        (Subnet((1, 1), ()), "own", errors.SubnetError, "gates"),
    ],
)
def test_a_subnet_or_norm_that_the_model_does_not_have_is_refused_with_the_remedy(tiny, subnet, norm, error, message):
    with pytest.raises(error, match=message):
        tiny(random_images(TINY, 1), subnet, norm=norm)


@pytest.mark.parametrize(
    "images",
    [np.zeros(shape, np.uint8) for shape in ((1, 8, 9, 1), (9, 9, 1), ())] + [np.zeros((1, 9, 9, 1), np.float32), [[1.0]]],
)
def test_inputs_of_the_wrong_shape_or_dtype_are_refused_with_what_was_expected(tiny, images):
    with pytest.raises(errors.InputError, match=r"expected inputs of shape \(batch, 9, 9, 1\) and dtype uint8"):
        tiny(images, SPACE.largest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "ofa_resnt"}, "did you mean 'ofa_resnet'"),
        ({"family": None}, "unknown family"),
        ({"stem_widht": 8}, "did you mean 'stem_width'"),
    ],
)
def test_an_unknown_family_or_field_gets_the_nearest_name_suggested(change, message):
    with pytest.raises(errors.UnknownNameError, match=message):
        families.config_from_json({**families.config_to_json(TINY), **change})
