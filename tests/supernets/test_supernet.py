import numpy as np
import pytest
from tiny import TINY, random_images, random_statistics

from superserve_jax import errors, families
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet


def test_any_calibrated_subnet_gives_the_same_logits_as_its_sliced_program(tiny):
    images = random_images(TINY, 5)
    for subnet in tiny.calibrated:
        program = programs.sliced(TINY, subnet)
        expected = program.infer(tiny.params, images, tiny.statistics[subnet], program.active(subnet))
        np.testing.assert_allclose(tiny(images, subnet), expected, atol=1e-5 * np.abs(expected).max())


def test_a_subnet_without_statistics_is_refused_with_the_remedy(tiny):
    with pytest.raises(errors.NotCalibratedError, match=r"train/calibrate\.py"):
        tiny(random_images(TINY, 1), TINY.space().subnet(depth=(0, 0, 1), width=0.5, expand=1.0))


def test_shared_statistics_are_cut_from_the_statistics_of_the_largest_subnet(tiny):
    subnet = TINY.space().smallest()
    shared, full = tiny.statistics_of(subnet, norm="shared"), tiny.statistics[TINY.space().largest()]
    start = 0
    largest = TINY.norm_sizes(TINY.sizes(TINY.space().largest()))
    for name, n in TINY.norm_sizes(TINY.sizes(subnet)).items():
        offset = sum(list(largest.values())[: list(largest).index(name)])
        np.testing.assert_array_equal(shared[:, start : start + n], full[:, offset : offset + n])
        start += n
    assert not np.allclose(tiny(random_images(TINY, 2), subnet), tiny(random_images(TINY, 2), subnet, norm="shared"))


def test_shared_statistics_need_the_statistics_of_the_largest_subnet():
    model = SuperNet.create(TINY, seed=0)
    model.statistics = {TINY.space().smallest(): random_statistics(TINY, TINY.space().smallest())}
    with pytest.raises(errors.NotCalibratedError, match="the largest subnet has no"):
        model(random_images(TINY, 1), TINY.space().smallest(), norm="shared")


def test_a_mistyped_norm_is_refused(tiny):
    with pytest.raises(errors.UnknownNameError, match="did you mean 'shared'"):
        tiny(random_images(TINY, 1), TINY.space().largest(), norm="sharde")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 9, 9, 1), np.float32),
        np.zeros((1, 8, 9, 1), np.uint8),
        np.zeros((9, 9, 1), np.uint8),
        np.zeros((), np.uint8),
        [[1.0]],
    ],
)
def test_inputs_of_the_wrong_shape_or_dtype_are_refused_with_what_was_expected(tiny, images):
    with pytest.raises(errors.InputError, match=r"expected inputs of shape \(batch, 9, 9, 1\) and dtype uint8"):
        tiny(images, TINY.space().largest())


def test_a_subnet_of_another_space_is_refused(tiny):
    from superserve_jax.subnet import Subnet

    with pytest.raises(errors.SubnetError):
        tiny(random_images(TINY, 1), Subnet((1, 1), ()))


def test_a_family_s_config_survives_json():
    assert families.config_from_json(families.config_to_json(TINY)) == TINY


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
