"""Prepared datasets with damaged, missing or exchanged files: an error that names the file, and what to do."""

import dataclasses
import os
import random
import re
import shutil

import bad
import numpy as np
import pytest
import tensorflow_datasets as tfds
from noise import CONFIG
from small_datasets import take

from superserve_jax import errors
from superserve_jax.training import data, loop
from superserve_jax.training.data import DataConfig
from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.datasets.cluttered_digits.cluttered_digits_dataset_builder import ClutteredDigits

pytestmark = pytest.mark.usefixtures("no_test_hangs")

REMEDY = r"restore it, or remove \S+cluttered_digits/1\.0\.0 and start again, which makes the dataset or says how"


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory):
    """A TFDS folder with a small cluttered_digits: 60 training images in three shards, 30 test images in three."""
    folder = tmp_path_factory.mktemp("tfds")
    how = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "NUM_IMAGES", {"train": 60, "test": 30})
        ClutteredDigits(data_dir=str(folder)).download_and_prepare(file_format="array_record", download_config=how)
    return folder


@pytest.fixture
def digits(three_shards, tmp_path):
    """The folder of a copy of the dataset."""
    shutil.copytree(three_shards / "cluttered_digits", tmp_path / "cluttered_digits")
    return tmp_path / "cluttered_digits" / "1.0.0"


def read(digits, **changes):
    """Inputs and labels of all splits."""
    dataset = data.open(DataConfig(data_dir=str(digits.parents[1]), validation=6, **changes))
    return [part for split in ("train", "validation", "test") for part in dataset.arrays(split)]


def shard(digits, split="train", number=1):
    return digits / f"cluttered_digits-{split}.array_record-{number:05}-of-00003"


SPOILS = {
    "is missing": lambda path, _: path.unlink(),
    "is damaged: ArrayRecord file should be at least 64KB": lambda path, _: path.write_bytes(b""),
    "is damaged: Invalid Riegeli": lambda path, good: path.write_bytes(good[:-1]),
    "is damaged: Corrupted Riegeli": lambda path, good: path.write_bytes(bytes(len(good))),
    "is damaged: ": lambda path, good: path.write_bytes(good[:65536]),
    "is another file: 10 records instead of 20": lambda path, _: shutil.copy(shard(path.parent, "test"), path),
    "is not a regular file": lambda path, _: (path.unlink(), os.mkfifo(path)),
    "is not a regular file; ": lambda path, _: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("message", SPOILS)
def test_a_spoiled_shard_is_refused_by_name_when_the_dataset_is_opened(digits, message):
    path = shard(digits)
    SPOILS[message](path, path.read_bytes())
    with pytest.raises(errors.DataError, match=f"{path} {message}") as caught:
        data.open(DataConfig(data_dir=str(digits.parents[1]), validation=6))
    assert "remove" in str(caught.value)


def test_a_flipped_bit_reads_the_same_or_is_refused_with_the_shard(digits):
    path, expected, rng = shard(digits), read(digits), random.Random(0)
    good, refused = path.read_bytes(), 0
    for place in rng.sample(range(len(good)), 40):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
        found = bad.attempt(lambda: read(digits, cache=False), errors.DataError)
        if isinstance(found, errors.DataError):
            refused += 1
            assert re.search(f"{path} is damaged.*{REMEDY}", str(found))
        else:
            assert all(map(np.array_equal, found, expected))
    assert refused > 5


def test_a_training_stream_that_meets_a_damaged_record_raises_the_error(digits):
    path = shard(digits, number=0)
    good = path.read_bytes()
    path.write_bytes(good[:10_000] + b"spoiled" + good[10_007:])
    dataset = data.open(DataConfig(data_dir=str(digits.parents[1]), validation=6, cache=False))
    with pytest.raises(errors.DataError, match=rf"{path} is damaged at record \d+: .*; {REMEDY}"):
        take(dataset.train(8, seed=0), 7)


def test_training_on_a_damaged_dataset_leaves_no_folder(digits, tmp_path):
    path = shard(digits, number=0)
    good = path.read_bytes()
    path.write_bytes(good[:100] + b"spoiled" + good[107:])  # the first record
    config = dataclasses.replace(CONFIG, data=DataConfig(data_dir=str(digits.parents[1]), validation=6, cache=False))
    with pytest.raises(errors.DataError, match=rf"{path} is damaged at record 0: .*; {REMEDY}"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"[]", b"\xff\xfe", "half", "pipe", "folder"])
def test_a_damaged_description_is_refused_and_says_which_folder_to_remove(digits, content):
    path = digits / "dataset_info.json"
    half = path.read_bytes()[:500]
    path.unlink()
    if content in ("pipe", "folder"):
        {"pipe": os.mkfifo, "folder": os.mkdir}[content](path)
    elif content is not None:
        path.write_bytes(half if content == "half" else content)
    with pytest.raises(errors.DataError, match=rf"remove (it|{digits.parent})"):
        read(digits)


def test_the_remedy_works(digits, monkeypatch):
    expected = read(digits)
    shard(digits).unlink()
    shutil.rmtree(digits)
    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 60, "test": 30})
    assert all(map(np.array_equal, read(digits), expected))


def test_a_preparation_that_fails_leaves_no_files(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 5, "test": 2})
    with monkeypatch.context() as patch:
        patch.setattr(render, "render", full)
        with pytest.raises(errors.DataError, match=r"could not be written to .*No space left"):
            prepared.load("cluttered_digits", str(tmp_path))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert prepared.load("cluttered_digits", str(tmp_path)).info.splits["train"].num_examples == 5


def test_an_example_without_a_class_is_refused(digits, monkeypatch):
    """Test splits of some datasets have the label -1."""
    monkeypatch.setattr(tfds.features.ClassLabel, "num_classes", 5)
    with pytest.raises(errors.DataError, match=r"has the label \d, but 'cluttered_digits' has 5 classes"):
        read(digits)


def test_an_impossible_number_of_classes_is_refused_before_they_are_named(digits, monkeypatch):
    monkeypatch.setattr(tfds.features.ClassLabel, "num_classes", 10**12)
    with pytest.raises(errors.DataError, match="has 1,000,000,000,000 classes, expected 1 to 100,000"):
        read(digits)
