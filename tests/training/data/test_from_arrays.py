"""The user's own data: arrays in memory and folders of images; configs of every kind as JSON; whether data and model fit."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
from small_datasets import assert_resumes, sizes, take
from tiny import TINY

from superserve_jax import errors
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training import data
from superserve_jax.training.data import DataConfig, FolderConfig, TextConfig, fit
from superserve_jax.vocabulary import Vocabulary

CLASSES = ("cat", "dog", "owl")


def arrays(count):
    """Images whose first pixel is their number, sorted by class."""
    x = np.random.default_rng(0).integers(0, 256, (count, 9, 9, 1), dtype=np.uint8)
    x[:, 0, 0, 0] = np.arange(count)
    return x, np.sort(np.arange(count) % 3)


def from_arrays(**changes):
    """60 training images, of which 12 are held out, and 20 test images."""
    return data.from_arrays(**{"train": arrays(60), "test": arrays(20), "validation": 12, **changes})


def numbers(inputs):
    return inputs[:, 0, 0, 0].tolist()


# -- arrays -------------------------------------------------------------------------------------------------------------


def test_arrays_give_every_example_once_with_its_label_and_hold_some_out():
    dataset, (_, labels) = from_arrays(), arrays(60)
    assert sizes(dataset) == [48, 12, 20]
    train = take(dataset.train(16, seed=0), 3)
    [validation] = dataset.eval("validation", 12)
    for batch in (*train, validation):
        assert batch["label"].tolist() == labels[numbers(batch["inputs"])].tolist()
    seen = numbers(np.concatenate([batch["inputs"] for batch in train]))
    assert sorted(seen) == sorted(numbers(dataset.arrays("train")[0]))
    assert sorted(seen + numbers(validation["inputs"])) == list(range(60))
    assert validation["weight"].tolist() == [1.0] * 12
    assert numbers(dataset.arrays("test")[0]) == list(range(20))


def test_the_first_examples_of_sorted_arrays_are_of_every_class():
    dataset = from_arrays(validation=arrays(60))
    for split in ("train", "validation"):
        assert set(dataset.arrays(split, limit=20)[1]) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(), (5,), (4, 2, 3)])
def test_inputs_may_have_any_shape_and_numeric_dtype(dtype, shape):
    x = np.ones((8, *shape), dtype)
    dataset = data.from_arrays(train=(x, [0, 1] * 4), test=(x, [0, 1] * 4), validation=2)
    batch = next(dataset.train(3, seed=0))
    assert (batch["inputs"].shape, batch["inputs"].dtype, batch["label"].dtype) == ((3, *shape), dtype, np.int32)


def test_a_resumed_stream_of_shifted_images_goes_on_exactly():
    shifted, plain = from_arrays(shift=2, flip=True), from_arrays()
    assert_resumes(shifted, 7, 9)
    first, unshifted = (next(dataset.train(7, seed=1))["inputs"] for dataset in (shifted, plain))
    assert not np.array_equal(first, unshifted)


def test_the_users_arrays_are_neither_copied_nor_changed_nor_locked():
    x, y = arrays(60)
    dataset = from_arrays(train=(x, y), test=(x, y))
    assert np.shares_memory(dataset.arrays("test")[0], x)
    next(dataset.train(48, seed=0))["inputs"][:] = 0
    assert numbers(x) == list(range(60))
    x[0] = 1  # still the user's to write


def test_class_names_are_the_labels_where_none_are_given():
    assert from_arrays().class_names == ("0", "1", "2")
    named = from_arrays(class_names=CLASSES)
    assert (named.class_names, named.num_classes) == (CLASSES, 3)


def test_without_validation_examples_the_split_is_a_data_error():
    with pytest.raises(errors.DataError, match="set validation above 0"):
        from_arrays(validation=0).num_examples("validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": arrays(60)[0]}, "train must be a pair"),
        ({"train": (arrays(60)[0], arrays(59)[1])}, "train needs as many labels as inputs, got 59 for 60"),
        ({"test": (arrays(0)[0], arrays(0)[1])}, "test needs as many labels as inputs, got 0 for 0"),
        ({"train": (arrays(60)[0], arrays(60)[1] / 2)}, r"labels of train must be integers of shape \(N,\), got float64"),
        ({"test": (arrays(20)[0], np.eye(20, dtype=int))}, r"got int64 of shape \(20, 20\)"),
        ({"train": (["a"] * 60, arrays(60)[1])}, "inputs of train must be an array of numbers"),
        ({"test": (arrays(20)[0], arrays(20)[1] - 1)}, r"from 0 to 2 \(3 classes\); test has -1"),
        ({"test": (arrays(20)[0], arrays(20)[1] + 1)}, r"from 0 to 2 \(3 classes\); test has 3"),
        ({"class_names": CLASSES[:2]}, r"from 0 to 1 \(2 classes\); train has 2"),
        ({"test": (arrays(20)[0][:, 1:], arrays(20)[1])}, r"uint8 \(N, 9, 9, 1\); got uint8 \(N, 8, 9, 1\)"),
        ({"validation": (arrays(20)[0] / 255, arrays(20)[1])}, r"inputs of validation must be like .* got float64"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused_at_once(changes, message):
    with pytest.raises(errors.DataError, match=message):
        from_arrays(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 60}, "must leave some of the 60"),
        ({"validation": -1}, "validation must be int >= 0"),
        ({"shift": -1}, "shift"),
        ({"train": (np.zeros((60, 5)), arrays(60)[1]), "test": (np.zeros((9, 5)), arrays(9)[1]), "flip": True}, "for images"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        from_arrays(**changes)


# -- a folder -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path):
    """A folder of pictures of several kinds and sizes; the grey value tells the class."""
    for split, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                mode, kind = (("RGB", "jpg"), ("L", "PNG"))[i % 2]
                picture = PIL.Image.new(mode, (20 + i, 30), (100 * label,) * 3 if mode == "RGB" else 100 * label)
                picture.save(tmp_path / split / name / f"{i}.{kind}")
    return tmp_path


def folder(path, **changes):
    return FolderConfig(**{"path": str(path), "validation": 6, "image_size": 16, **changes})


@pytest.mark.parametrize("cache", [True, False])
def test_a_folder_gives_images_with_the_label_of_their_folder(pets, cache):
    dataset = data.open(folder(pets, cache=cache))
    assert (dataset.class_names, dataset.name) == (CLASSES, str(pets))
    assert sizes(dataset) == [24, 6, 9]
    for batch in [next(dataset.train(24, seed=0)), *dataset.eval("validation", 6), *dataset.eval("test", 9)]:
        assert batch["inputs"].shape[1:] == (16, 16, 1)
        assert np.abs(batch["inputs"][:, 8, 8, 0] - 100.0 * batch["label"]).max() <= 2  # JPEG


def test_a_folder_in_colour_with_random_crops_is_reproducible(pets):
    dataset = data.open(folder(pets, channels=3, cache=False, random_crop=True, flip=True))
    assert next(dataset.train(4, seed=0))["inputs"].shape == (4, 16, 16, 3)
    assert_resumes(dataset, 4, 5)


def test_the_first_training_images_of_a_folder_are_of_every_class(pets):
    assert set(data.open(folder(pets)).arrays("train", limit=12)[1]) == {0, 1, 2}


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(pets, content):
    file = pets / "test" / "dog" / "1.PNG"
    file.write_bytes(content if content is not None else file.read_bytes()[:40])
    with pytest.raises(errors.DataError, match=r"dog/1\.PNG cannot be decoded"):
        data.open(folder(pets)).arrays("test")


def test_other_files_are_left_out_with_a_warning(pets, caplog):
    (pets / "train" / "cat" / "notes.txt").write_text("")
    (pets / "train" / "cat" / ".DS_Store").write_text("")
    assert data.open(folder(pets)).num_examples("train") == 24
    assert "holds 1 files without a suffix of .png" in caplog.text


def test_a_folder_that_is_not_laid_out_as_it_should_is_a_data_error(pets, tmp_path):
    with pytest.raises(errors.DataError, match="absent does not exist; put images into"):
        data.open(folder(tmp_path / "absent"))
    (pets / "test" / "emu").mkdir()
    with pytest.raises(errors.DataError, match="emu is a class that"):
        data.open(folder(pets))
    (pets / "train" / "emu").mkdir()
    with pytest.raises(errors.DataError, match="train/emu has no images"):
        data.open(folder(pets))


# -- configs, and whether data and model fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DataConfig, {"name": ""}, "name must be"),
        (DataConfig, {"name": "huggingface:mnist"}, "without a namespace"),
        (DataConfig, {"validation": -1}, "validation must be int >= 0, got -1"),
        (DataConfig, {"validation": 10.5}, "validation"),
        (DataConfig, {"image_size": 0}, "image_size"),
        (DataConfig, {"image_size": float("nan")}, "image_size"),
        (DataConfig, {"channels": 4}, "channels must be 1 or 3, got 4"),
        (DataConfig, {"shift": True}, "shift"),
        (DataConfig, {"shift": 32}, "shift must be less than image_size=32"),
        (DataConfig, {"flip": 1}, "flip must be bool, got 1"),
        (DataConfig, {"random_crop": True}, "set cache=False"),
        (FolderConfig, {"path": "x", "channels": 2}, "channels"),
        (TextConfig, {"name": ""}, "name must be"),
        (TextConfig, {"max_length": 2}, "max_length must be int >= 3, got 2"),
        (TextConfig, {"validation": -1}, "validation"),
        (TextConfig, {"token_types": 3}, "token_types must be 1 or 2, got 3"),
        (TextConfig, {"lowercase": "yes"}, "lowercase"),
        (TextConfig, {"vocabulary": "vocab.txt"}, "leave it out"),
        (TextConfig, {"name": "glue/mnli"}, r"give the path of a WordPiece file, such as BERT's vocab\.txt"),
    ],
)
def test_a_config_value_that_cannot_work_is_refused(kind, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        kind(**changes)


@pytest.mark.parametrize(
    "config",
    [
        DataConfig("cifar10", channels=3, flip=True),
        FolderConfig("~/pets", validation=10),
        TextConfig("glue/mnli", vocabulary="vocab.txt", token_types=2),
    ],
)
def test_a_config_of_any_kind_survives_json(config):
    assert data.data_from_json(json.loads(json.dumps(data.data_to_json(config)))) == config


def test_an_image_config_has_no_kind_in_json_as_in_older_versions():
    config = DataConfig("cifar10", channels=3)
    assert data.data_to_json(config) == dataclasses.asdict(config)
    assert data.data_from_json({"name": "cifar10", "kind": "images"}) == DataConfig("cifar10")


def test_an_unknown_kind_or_field_gets_the_nearest_name():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'folder'"):
        data.data_from_json({"kind": "folders"})
    with pytest.raises(errors.UnknownNameError, match="did you mean 'max_length'"):
        data.data_from_json({"kind": "text", "max_lenght": 3})
    with pytest.raises(errors.ConfigError, match="must be one of DataConfig, FolderConfig, TextConfig, TextFileConfig, got 3"):
        data.open(3)


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({}, {"num_classes": 4}, "num_classes is 4, but arrays has 3 classes"),
        ({}, {"image_size": 8}, r"shape \(batch, 8, 8, 1\)"),
        ({"train": (arrays(60)[0] / 255, arrays(60)[1]), "test": (arrays(20)[0] / 255, arrays(20)[1])}, {}, "dtype uint8"),
    ],
)
def test_a_dataset_fits_a_model_only_with_its_classes_shape_and_dtype(changes, model, message):
    fit.check(from_arrays(), TINY)
    with pytest.raises(errors.ConfigError, match=message):
        fit.check(from_arrays(**changes), dataclasses.replace(TINY, **model))


def test_a_dataset_of_texts_fits_a_model_only_with_its_vocabulary():
    pair = np.ones((9, 8), np.int32), np.arange(9) % 3
    dataset = from_arrays(train=pair, test=pair, validation=2)
    model = DynaBERTConfig(vocab_size=5, max_length=8, token_types=1)
    fit.check(dataset, model)
    with pytest.raises(errors.ConfigError, match="the model does not take the inputs"):
        fit.check(dataset, dataclasses.replace(model, max_length=9))
    dataset.vocabulary = Vocabulary(("[PAD]", "[CLS]", *"abcd"), scheme="words")
    with pytest.raises(errors.ConfigError, match="6 tokens"):
        fit.check(dataset, model)
