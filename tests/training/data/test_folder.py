"""A folder of the user's own images: its layouts, odd files, damaged images, and the one message about all problems.

One file because all tests write variants of the same small folder.
"""

import itertools
import logging
import os
import pathlib

import numpy as np
import PIL.Image
import pytest
from small_datasets import sizes
from tiny import TINY

from superserve_jax import errors, image_files
from superserve_jax.training import data
from superserve_jax.training.data import FolderConfig


def write(root, layout, count=20):
    """Writes `count` pictures of one grey value into each folder of `layout`."""
    for k, folder in enumerate(layout.split()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            PIL.Image.new("RGB", (12, 10), (10 * k,) * 3).save(root / folder / f"{i}.png")


def opened(root, *, model=None, decode=True, **changes):
    return data.open(FolderConfig(**{"path": str(root), "image_size": 8, "channels": 3, **changes}), model, decode=decode)


def problems_of(root, **changes):
    with pytest.raises(errors.DataError) as e:
        opened(root, **changes)
    return str(e.value)


# -- layouts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected", "note"),
    [
        ("train/a train/b val/a val/b test/a test/b", [40, 40, 40], "40 from val/ for validation, 40 from test/ for testing"),
        ("train/a train/b valid/a valid/b", [36, 40, 4], "40 from valid/ for validation, 4 held out for testing"),
        ("train/a train/b validation/b test/a", [40, 20, 20], "20 from validation/ for validation"),
        ("train/a train/b test/a", [36, 4, 20], "36 examples for training, 4 held out for validation, 20 from test/"),
        ("train/a train/b", [32, 4, 4], "4 held out for validation, 4 held out for testing"),
        ("a b c", [48, 6, 6], "48 examples for training, 6 held out for validation, 6 held out for testing"),
        ("Training/a Training/b Testing/a", [36, 4, 20], "20 from Testing/ for testing"),
    ],
)
def test_a_split_is_a_folder_or_else_a_tenth_of_the_training_images(tmp_path, layout, expected, note):
    write(tmp_path, layout)
    dataset = opened(tmp_path)
    assert sizes(dataset) == expected
    assert note in data.describe(dataset)
    values = {tuple(image.ravel()) for split in ("train", "validation", "test") for image in dataset.arrays(split)[0]}
    assert len(values) == len(layout.split())


def test_held_out_images_are_in_one_split_only_and_always_the_same(tmp_path):
    write(tmp_path, "a b")
    for i, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        PIL.Image.new("L", (8, 8), i).save(path)
    seen = [opened(tmp_path).arrays(split)[0][:, 0, 0, 0].tolist() for split in ("train", "validation", "test")]
    assert sorted(itertools.chain(*seen)) == list(range(40))
    assert seen == [opened(tmp_path).arrays(split)[0][:, 0, 0, 0].tolist() for split in ("train", "validation", "test")]


def test_at_least_two_images_are_held_out_for_testing_because_one_half_of_them_is_replayed(tmp_path):
    write(tmp_path, "a b", 5)
    assert sizes(opened(tmp_path)) == [7, 1, 2]


def test_a_number_of_validation_images_wins_over_a_folder(tmp_path):
    write(tmp_path, "train/a train/b val/a test/a")
    assert sizes(opened(tmp_path, validation=7)) == [33, 7, 20]


def test_classes_are_named_by_their_folders_whose_names_may_have_spaces(tmp_path):
    write(tmp_path, "train/big train/Émile test/big", 3)
    (tmp_path / "train" / "big").rename(tmp_path / "train" / "big cat")
    (tmp_path / "test" / "big").rename(tmp_path / "test" / "big cat")
    assert opened(tmp_path).class_names == ("big cat", "Émile")


# -- odd files ----------------------------------------------------------------------------------------------------------------


def test_files_that_systems_and_archives_add_are_no_images(tmp_path, caplog):
    write(tmp_path, "train/a train/b test/a", 4)
    for name in (".DS_Store", "train/.DS_Store", "train/a/.DS_Store", "train/a/._0.png", "train/b/.thumbs/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("__MACOSX", "train/.git", "train/__MACOSX"):
        (tmp_path / name).mkdir()
    dataset = opened(tmp_path, validation=0)
    assert (dataset.class_names, dataset.num_examples("train")) == (("a", "b"), 8)
    assert not [r for r in caplog.records if r.name.startswith("superserve_jax")]


def test_suffixes_may_be_in_capitals_and_images_in_subfolders_and_links(tmp_path):
    write(tmp_path, "train/a train/b test/a", 2)
    a = tmp_path / "train" / "a"
    (a / "0.png").rename(a / "0.PNG")
    (a / "2021" / "may").mkdir(parents=True)
    (a / "1.png").rename(a / "2021" / "may" / "1.png")
    (a / "2.png").symlink_to(a / "0.PNG")
    (a / "loop").symlink_to(a)
    (tmp_path / "train" / "c").symlink_to(tmp_path / "train" / "b")
    dataset = opened(tmp_path, validation=0)
    assert (dataset.class_names, dataset.num_examples("train")) == (("a", "b", "c"), 3 + 2 + 2)


def test_images_outside_the_folders_of_the_classes_are_ignored_with_a_warning(tmp_path, caplog):
    write(tmp_path, "train/a train/b test/a", 2)
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "0.png")
    assert opened(tmp_path, validation=0).num_examples("train") == 3
    assert "1 images are in no class and are ignored, such as 0.png" in caplog.text


def picture(tmp_path, image, **options):
    image.save(tmp_path / "x.png", **options)
    return data.read_image(tmp_path / "x.png", image_size=4)


def test_a_picture_of_any_mode_becomes_rgb(tmp_path):
    grey = PIL.Image.new("L", (4, 4), 100)
    for mode in ("L", "RGB", "P", "LA", "RGBA", "1"):
        expected = 255 if mode == "1" else 100
        assert (picture(tmp_path, PIL.Image.new("1", (4, 4), 1) if mode == "1" else grey.convert(mode)) == expected).all(), (
            mode
        )
    PIL.Image.new("CMYK", (4, 4), (0, 0, 0, 155)).save(tmp_path / "x.jpg")
    assert np.abs(data.read_image(tmp_path / "x.jpg", image_size=4) - 100.0).max() <= 3


def test_transparent_pixels_become_white(tmp_path):
    assert (picture(tmp_path, PIL.Image.new("RGBA", (4, 4), (9, 9, 9, 0))) == 255).all()
    assert (picture(tmp_path, PIL.Image.new("LA", (4, 4), (9, 0))) == 255).all()
    assert (picture(tmp_path, PIL.Image.new("L", (4, 4), 9).convert("P"), transparency=9) == 255).all()


def test_16_bit_grey_keeps_its_upper_bits(tmp_path):
    assert (picture(tmp_path, PIL.Image.fromarray(np.full((4, 4), 25_700, np.uint16))) == 100).all()


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image, exif = PIL.Image.new("L", (8, 8)), PIL.Image.Exif()
    image.paste(255, (0, 0, 8, 4))  # the upper half is white
    exif[0x0112] = 6  # the camera was turned: the stored upper side is the right one
    image.save(tmp_path / "x.png", exif=exif)
    turned = data.read_image(tmp_path / "x.png", image_size=8, channels=1)[:, :, 0]
    assert (turned[:, 4:] == 255).all()
    assert (turned[:, :4] == 0).all()


def test_an_image_for_a_query_is_what_evaluation_reads(tmp_path):
    write(tmp_path, "train/a train/b test/a", 3)
    noise = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "test" / "a" / "0.png")
    [first, *_], _ = opened(tmp_path).arrays("test")
    assert np.array_equal(data.read_image(tmp_path / "test" / "a" / "0.png", image_size=8), first)
    with pytest.raises(errors.DataError, match=r"absent\.png cannot be read as an image: .*; expected a PNG"):
        data.read_image(tmp_path / "absent.png", image_size=8)
    (tmp_path / "text.png").write_text("not pixels")
    with pytest.raises(errors.DataError) as e:
        data.read_image(tmp_path / "text.png", image_size=8)
    expected = f"{tmp_path / 'text.png'} cannot be read as an image: its content is no image; expected a PNG, JPEG, ..."
    assert str(e.value) == expected


@pytest.mark.parametrize(
    ("image_size", "note"),
    [
        (10, "; 2 of 6 images are smaller (8 pixels) and are enlarged to 10, which --data.image-size sets"),
        (12, "; 6 of 6 images are smaller (8 to 10 pixels) and are enlarged to 12, which --data.image-size sets"),
        (8, ""),
    ],
)
def test_images_that_are_enlarged_are_reported_with_the_classes(tmp_path, image_size, note):
    write(tmp_path, "train/a train/b test/a", 2)  # pictures of 12x10
    for name in ("train/a/0.png", "test/a/1.png"):
        PIL.Image.new("L", (20, 8)).save(tmp_path / name)
    described = data.describe(opened(tmp_path, image_size=image_size, validation=0))
    assert described == f"{tmp_path}: 2 classes; 4 examples for training, 2 from test/ for testing{note}"


# -- damaged images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Two classes of 20 images. Three of them cannot be read."""
    write(tmp_path, "train/a train/b test/b")
    rng = np.random.default_rng(0)
    whole = tmp_path / "train" / "a" / "whole.jpg"
    PIL.Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "train" / "a" / "cut.jpg").write_bytes(whole.read_bytes()[:-300])
    (tmp_path / "train" / "b" / "3.png").write_bytes(b"")
    (tmp_path / "test" / "b" / "5.png").write_text("<html>404</html>")
    return tmp_path


def test_all_damaged_images_are_in_one_message_before_training(damaged):
    message = problems_of(damaged)
    assert "has 3 problems" in message
    for expected in (r"train/a/cut.jpg cannot be decoded: image file is truncated", "train/b/3.png", "test/b/5.png"):
        assert expected in message
    assert "--data.skip-bad (skip_bad=True) leaves out" in message


def test_skip_bad_leaves_them_out_with_one_warning_that_lists_them(damaged, caplog):
    dataset = opened(damaged, skip_bad=True, validation=4)
    assert sizes(dataset) == [36, 4, 19]
    opened(damaged, skip_bad=True, validation=4, decode=False)  # as a later stage of the same program does
    [message] = [r.message for r in caplog.records if r.name.startswith("superserve_jax")]
    first, *each = message.splitlines()
    assert first == f"{damaged}: 3 images cannot be read and are left out:"
    assert [line.split()[1] for line in each] == ["test/b/5.png", "train/a/cut.jpg", "train/b/3.png"]
    assert each[0] == "  - test/b/5.png cannot be decoded: its content is no image"
    for split in ("train", "validation", "test"):
        dataset.arrays(split)


def test_many_damaged_images_are_counted_in_the_message_and_listed_in_the_log(damaged, caplog):
    for path in sorted((damaged / "train" / "b").iterdir()):
        path.write_bytes(b"x")
    message = problems_of(damaged)
    assert "has 22 problems" in message
    assert "12 more, which are listed above" in message
    own = [r for r in caplog.records if r.name.startswith("superserve_jax")]
    assert len([r for r in own if r.levelno == logging.WARNING]) == 12


def test_a_warning_lists_at_most_50_images_that_are_left_out(damaged, caplog):
    write(damaged, "train/c", 60)
    for path in (damaged / "train" / "c").iterdir():
        path.write_bytes(b"x" if path.stem != "0" else path.read_bytes())
    opened(damaged, skip_bad=True, validation=0)
    assert "62 images cannot be read" in caplog.text
    assert caplog.text.count("\n  - ") == 51
    assert caplog.text.endswith("\n  - 12 more\n")


def test_images_are_decoded_once_for_all_stages_of_a_program(damaged, monkeypatch):
    (damaged / "train" / "b" / "4.png").touch()  # another time than in other tests
    opened(damaged, skip_bad=True)
    monkeypatch.setattr(image_files, "decode", lambda *_: pytest.fail("decoded again"))
    opened(damaged, skip_bad=True)


def test_later_stages_decode_no_image_before_they_use_it(damaged, monkeypatch):
    (damaged / "train" / "b" / "6.png").touch()  # another time than in other tests
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", lambda *_: pytest.fail("decoded"))
        dataset = opened(damaged, decode=False)
    with pytest.raises(errors.DataError, match=r"test/b/5\.png cannot be decoded"):
        dataset.arrays("test")
    assert sizes(opened(damaged, skip_bad=True, decode=False)) == sizes(opened(damaged, skip_bad=True))


# -- one message --------------------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_in_one_message(damaged):
    for name in ("train/empty", "test/B", "test/zebra"):
        (damaged / name).mkdir()
    (damaged / "train" / "a" / "gone.png").symlink_to(damaged / "nowhere")
    message = problems_of(damaged, model=TINY)  # of 3 classes, for grey images of 9x9
    for expected in (
        "test/B is a class that train does not have (did you mean b?)",
        "test/zebra is a class that train does not have\n",
        "train/empty has no images; known suffixes: .png",
        "train/a/gone.png is a pipe, a broken link or the like",
        "model.image_size is 9, but the inputs of",
        "model.channels is 1, but the inputs of",
        "train/b/3.png cannot be decoded",
    ):
        assert expected in message
    assert "has 9 problems" in message


def test_the_number_of_classes_of_the_model_must_be_that_of_the_folder(tmp_path):
    write(tmp_path, "train/a train/b test/a", 2)
    assert "model.num_classes is 3, but" in problems_of(tmp_path, model=TINY, image_size=9, channels=1)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("images/a images/b", "images is the only class, and at least 2 are needed; if its folders are the classes, give"),
        ("train/a", "train/a is the only class, and at least 2 are needed"),
        ("val/a test/a", "has test and val, but no train"),
        ("train/a train/b val/a valid/a", "val and valid both stand for the validation split; remove one of them"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_refused(tmp_path, layout, message):
    write(tmp_path, layout, 2)
    assert message in problems_of(tmp_path)


def test_a_folder_without_classes_says_where_images_go(tmp_path):
    (tmp_path / "1.png").write_bytes(b"x")
    assert f"has no folders; put images into {tmp_path / 'train' / 'CLASS'}" in problems_of(tmp_path)
    (tmp_path / "train").mkdir()
    assert "train has no folders of classes" in problems_of(tmp_path)
    assert "is not a folder" in problems_of(tmp_path / "1.png")
    with pytest.raises(errors.ConfigError, match=r"data\.path is not given; .* --data\.path ~/pets"):
        opened("")


def test_a_class_that_loses_all_its_images_is_refused(tmp_path):
    write(tmp_path, "train/a train/b test/a", 2)
    for i in range(2):
        (tmp_path / "train" / "b" / f"{i}.png").write_bytes(b"x")
    assert "b has too few images to hold some out; add some" in problems_of(tmp_path, skip_bad=True, validation=0)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pets", "a b", 10)
    assert sizes(opened(pathlib.Path("~") / "pets")) == [16, 2, 2]
    assert not os.path.exists("~")
