"""Rules of matrix products and convolutions."""

import jax
import pytest
from tracing_cases import CONTRACTIONS, IMAGE, X
from tracing_checks import check_axes, check_cases, random_params, reasons
from tracing_models import convolution

from superserve_jax import tracing


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_primitive_tells_which_axes_can_change(name):
    check_axes(name)


def test_results_and_gradients_are_those_of_small_parameters():
    check_cases(CONTRACTIONS)


def test_kernels_and_images_keep_their_sizes():
    found = reasons(
        lambda p, x: convolution(IMAGE + p["image"], p["kernel"]) @ p["b"],
        {"image": (1, 2, 2, 6), "kernel": (3, 3, 6, 4), "b": (4, 2)},
    )
    assert found["kernel[0]"] == found["kernel[1]"] == "the size of a kernel at tracing_models.py"


def test_a_convolution_that_is_a_gradient_keeps_all_sizes():
    def gradient(p, x):
        return jax.grad(lambda kernel: convolution(IMAGE * p["a"], kernel, groups=6).sum())(p["kernel"]) * p["b"]

    assert not tracing.trace(gradient, random_params({"kernel": (1, 1, 1, 6), "a": (6,), "b": (6,)}), X).groups
