"""Augmentation: each transform gives only the changes that it documents, and all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import image_files
from superserve_jax.training.data import augment


@settings(max_examples=25, deadline=None)
@given(pixels=st.integers(0, 5), seed=st.integers(0, 99), height=st.integers(1, 7), width=st.integers(1, 7))
def test_a_shifted_image_is_a_window_of_the_image_on_black(pixels, seed, height, width):
    images = np.random.default_rng(seed).integers(1, 256, (3, height, width, 2), dtype=np.uint8)
    shifted = augment.shift(images, pixels, np.random.default_rng(seed))
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    span = range(2 * pixels + 1)
    for i in range(3):
        windows = [padded[i, y : y + height, x : x + width] for y in span for x in span]
        assert any(np.array_equal(shifted[i], window) for window in windows)


def test_shifts_reach_every_offset_up_to_the_limit():
    images = np.zeros((400, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 1
    shifted = augment.shift(images, 2, np.random.default_rng(0))
    assert (shifted.sum((1, 2, 3)) == 1).all()
    assert shifted.any(0).all()


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others():
    images = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 3), dtype=np.uint8)
    flipped = augment.flip(images, np.random.default_rng(0))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 60 < mirrored.sum() < 140


@pytest.mark.parametrize("size", [(60, 40), (300, 20), (5, 200), (1, 1)])
def test_crops_have_the_size_that_was_asked_for(size):
    image = np.full((*size, 3), 7, np.uint8)
    for crop in (augment.random_resized_crop(image, 16, np.random.default_rng(0)), image_files.centre_crop(image, 16)):
        assert crop.shape == (16, 16, 3)
        assert (crop == 7).all()
