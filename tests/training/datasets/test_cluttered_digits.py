"""The dataset cluttered_digits: its pixels, and making it in parallel, after a kill and without permission."""

import hashlib
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from full_disk import disk_full_after

from superserve_jax import errors
from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.cluttered_digits import render


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "22074fa28ab24ab267d898277723f3824a279b9f8c4aa60e807984ea3ca387b3"),
        ("test", "6669186b9edc695162b4957bae2ceb1d1dc3d9a66556ec25fd232222f60a47d7"),
    ],
)
def test_the_pixels_of_cluttered_digits_are_the_same_on_every_machine(split, digest):
    scans, _ = render.load_scans(split)
    pixels = b"".join(render.render(scans, split, i)[0].tobytes() for i in range(0, render.NUM_IMAGES[split], 40))
    assert hashlib.sha256(pixels).hexdigest() == digest


def test_no_scan_of_the_test_split_is_in_the_train_split():
    train, test = render.load_scans("train")[0], render.load_scans("test")[0]
    assert (len(train), len(test)) == (1400, 397)
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}


def test_the_last_images_of_a_split_show_scans_that_no_image_before_them_shows():
    scans = np.zeros((1400, 8, 8))
    assert render.render(scans, "train", 18_999)[1] < render.render(scans, "train", 19_000)[1]


@pytest.mark.parametrize("corner", list(itertools.product((0.0, 1.0), repeat=4)))
def test_a_digit_lies_wholly_inside_the_image_at_every_scale_angle_and_place(corner):
    full, inside = np.ones((8, 8)), (*corner[:2], 0.5, 0.5)
    ink, centred = (render.place_digit(full, np.array(draws)).sum() for draws in (corner, inside))
    assert ink == pytest.approx(centred, rel=0.03)


def test_two_that_prepare_at_once_both_get_the_dataset(tmp_path, monkeypatch):
    both_are_making = threading.Barrier(2, timeout=120)
    load_scans = render.load_scans

    def load_together(split):
        both_are_making.wait()
        return load_scans(split)

    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 5, "test": 2})
    monkeypatch.setattr(render, "load_scans", load_together)
    with ThreadPoolExecutor(2) as threads:
        builders = list(threads.map(prepared.load, ["cluttered_digits"] * 2, [str(tmp_path)] * 2))
    assert [builder.info.splits["train"].num_examples for builder in builders] == [5, 5]


def test_a_file_that_another_process_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 5, "test": 2})
    prepared.load("cluttered_digits", str(tmp_path))
    monkeypatch.setattr(os, "walk", lambda folder: [(str(folder), [], ["removed"])])
    assert prepared.load("cluttered_digits", str(tmp_path)).info.splits["train"].num_examples == 5


def test_the_remains_of_a_killed_preparation_are_removed(tmp_path, monkeypatch):
    remains = tmp_path / "cluttered_digits" / "incomplete.ABCDEF_1.0.0"
    remains.mkdir(parents=True)
    (remains / "cluttered_digits-train.array_record-00000-of-00001").write_bytes(b"half")
    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 5, "test": 2})
    assert prepared.load("cluttered_digits", str(tmp_path)).info.splits["train"].num_examples == 5
    assert [path.name for path in (tmp_path / "cluttered_digits").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_full_disk_is_a_data_error_and_leaves_no_partial_files(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(render, "NUM_IMAGES", {"train": 5, "test": 2})
    with disk_full_after(limit), pytest.raises(errors.DataError, match=r"could not be written to .*; .*Free space there"):
        prepared.load("cluttered_digits", str(tmp_path))
    assert not list((tmp_path / "cluttered_digits").iterdir())
    assert prepared.load("cluttered_digits", str(tmp_path)).info.splits["train"].num_examples == 5


def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path):
    (tmp_path / "cluttered_digits").write_text("a file where a folder should be")
    with pytest.raises(errors.DataError, match="choose another data_dir"):
        prepared.load("cluttered_digits", str(tmp_path))
