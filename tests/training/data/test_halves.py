"""The two halves of a test split."""

import math

import numpy as np
import pytest

from superserve_jax import errors
from superserve_jax.training.data import halves
from superserve_jax.training.datasets.cluttered_digits import render


@pytest.mark.parametrize("count", [2, 3, 10, 41, 1000])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_both_halves_have_the_same_share_of_every_class(count, order, classes):
    labels = np.arange(count) * classes // count
    if order == "shuffled":
        labels = np.random.default_rng(0).permutation(labels)
    mask = halves.profiling_half(labels)
    assert 0 < mask.sum() < count
    for label in np.unique(labels):
        mine = mask[labels == label]
        assert abs(2 * mine.sum() - len(mine)) <= math.ceil(len(mine) / 8)  # a block


def test_the_halves_depend_on_the_labels_alone():
    labels = np.random.default_rng(1).integers(0, 10, 500)
    assert (halves.profiling_half(labels) == halves.profiling_half(labels.astype(np.int32).copy())).all()


def test_hardly_any_scan_of_cluttered_digits_is_in_both_halves():
    """Ten images show the same scan. Halves that share scans would measure nearly the same thing twice."""
    _, digits = render.load_scans("test")
    count = render.NUM_IMAGES["test"]
    scan = np.arange(count) * len(digits) // count
    mask = halves.profiling_half(digits[scan])
    both = set(scan[mask]) & set(scan[~mask])
    assert len(both) < 0.2 * len(digits)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_examples_are_refused(count):
    with pytest.raises(errors.DataError, match=f"has {count} examples; give at least 2"):
        halves.profiling_half(np.zeros(count, int))
