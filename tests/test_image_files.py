"""Image files as inputs of a server. Decoding itself is tested with the training data."""

import io

import numpy as np
import PIL.Image
import pytest
from pictures import file_of

from superserve_jax import errors, image_files
from superserve_jax.training import data


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_gives_the_input_that_read_image_gives(tmp_path, kind, channels):
    file = file_of(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8), kind)
    (tmp_path / "image").write_bytes(file)
    found = image_files.from_file(file, (16, 16, channels))
    assert (found.shape, found.dtype) == ((16, 16, channels), np.uint8)
    np.testing.assert_array_equal(found, data.read_image(tmp_path / "image", image_size=16, channels=channels))


def test_a_damaged_file_is_an_error():
    with pytest.raises(errors.InputError, match=r"\d+ bytes cannot be read as an image"):
        image_files.from_file(file_of(np.zeros((30, 40, 3), np.uint8))[:60], (16, 16, 3))


def test_a_small_file_with_a_huge_image_is_not_decoded(monkeypatch):
    monkeypatch.setattr(image_files, "decode", None)
    file = io.BytesIO()
    PIL.Image.new("1", (5_000, 5_000)).save(file, "PNG")
    assert len(file.getvalue()) < 100_000
    with pytest.raises(errors.InputError, match=r"25,000,000 pixels; a server decodes at most 16,000,000"):
        image_files.from_file(file.getvalue(), (16, 16, 3))
