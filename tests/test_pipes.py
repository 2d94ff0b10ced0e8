"""A pipe, socket, device or folder in place of a file that a user gives is refused at once. A pipe would block for ever."""

import contextlib
import itertools
import os
import pathlib

import numpy as np
import odd_files
import PIL.Image
import pytest
from tiny import TINY

from superserve_jax import convert, errors, files
from superserve_jax.profile import Profile
from superserve_jax.simulation import azure, recorded
from superserve_jax.training import data
from superserve_jax.training.config import load_config
from superserve_jax.training.data import FolderConfig
from superserve_jax.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("no_test_hangs")


@pytest.fixture(params=odd_files.ODD)
def place(request, tmp_path, monkeypatch):
    """A function that puts something that is not a file at a path in the current folder."""
    monkeypatch.chdir(tmp_path)

    def put(path):
        return odd_files.put(request.param, path)

    put.kind = request.param
    return put


@pytest.mark.parametrize(
    ("read", "name", "kind"),
    [
        (recorded.trace, "arrivals.csv", errors.DataError),
        (azure.invocations_per_minute, "day.csv", errors.DataError),
        (Vocabulary.read, "vocab.txt", errors.DataError),
        (Profile.load, "profile.json", errors.ProfileError),
        (load_config, "config.py", errors.ConfigError),
        *((lambda path: convert.weights(path, TINY), f"w.{kind}", errors.ConversionError) for kind in ("npz", "safetensors")),
    ],
)
def test_something_else_than_a_file_is_refused(place, read, name, kind):
    with pytest.raises(kind, match=r"\S"):
        read(place(name))


def test_something_else_than_an_image_in_a_folder_of_images_is_refused(place):
    for i, (split, name) in enumerate(itertools.product(("train", "train", "train", "test"), ("cat", "dog"))):
        file = pathlib.Path("pets", split, name, f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    config = FolderConfig("pets", image_size=8, validation=1)
    dataset = data.open(config)
    place("pets/train/cat/2.png")
    with pytest.raises(errors.DataError, match=r"pets/train/cat/2\.png cannot be read: .*; replace or remove it"):
        [dataset.arrays(split) for split in ("train", "validation")]
    if place.kind == "folder":  # folders in a class are no images
        assert data.open(config).num_examples("train") == 4
    else:
        with pytest.raises(errors.DataError, match=r"pets: train/cat/2\.png is a pipe, .*, not an image; replace"):
            data.open(config)


def descriptors_of(path):
    """The open descriptors of one file. Not all of the process: threads of other libraries open and close files, too."""
    found = []
    for each in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            if os.readlink(each) == str(path.absolute()):
                found.append(each)
    return found


def test_a_refused_file_is_closed(place):
    path = place("x")
    for _ in range(3):
        with pytest.raises(OSError):
            files.open_regular(path)
    assert not descriptors_of(path)


def test_a_file_that_stays_open_is_found(tmp_path):
    path = tmp_path / "x"
    path.touch()
    with files.open_regular(path):
        assert len(descriptors_of(path)) == 1
