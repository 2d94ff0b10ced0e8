"""Streams of batches from a small cluttered_digits and from mocks of cifar10 and imagenet2012.

One file because every test reads the same small datasets.

The mocks are the real TFDS builders, with the features they have upstream, that yield random pictures instead of downloads.
"""

import shutil
import sys

import numpy as np
import pictures
import pytest
from small_datasets import assert_resumes, assert_same_batches, prepare_mock, sizes, take
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.image_classification import cifar

from superserve_jax import errors
from superserve_jax.training import data
from superserve_jax.training.data import DataConfig, TextConfig, streams


def small(folder, **changes):
    """The small cluttered_digits: 280 training, 20 validation and 90 test images."""
    return data.open(DataConfig(data_dir=folder, **{"validation": 20, **changes}))


@pytest.fixture
def digits(digits_dir):
    return small(digits_dir)


def encoded(rng, size, *, mode="RGB", kind="png"):
    """A random picture of (width, height) as a file."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return pictures.file_of(rng.integers(0, 256, shape, dtype=np.uint8), kind)


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    """A TFDS folder with a mock of imagenet2012: random JPEGs of several sizes, and a test split without labels."""

    def make(split, i, rng):
        mode = "L" if i == 0 else "RGB"  # ImageNet has grey pictures
        image = encoded(rng, (40 + i, 60 - i), mode=mode, kind="jpeg")
        return {"file_name": f"{i}.JPEG", "image": image, "label": -1 if split == "test" else i * 80}

    folder = str(tmp_path_factory.mktemp("tfds"))
    prepare_mock(folder, imagenet2012_dataset_builder.Builder, {"train": 12, "validation": 5, "test": 3}, make)
    return folder


def imagenet(folder, **changes):
    config = {"image_size": 24, "channels": 3, "validation": 2, "random_crop": True, "cache": False, **changes}
    return data.open(DataConfig("imagenet2012", folder, **config))


def keys(images):
    return [image.tobytes() for image in images]


# -- training batches ---------------------------------------------------------------------------------------------------


def test_preparing_and_reading_do_not_import_tensorflow(digits):
    next(digits.train(8, seed=0))
    assert "tensorflow" not in sys.modules


def test_a_training_batch_has_uint8_images_and_int32_labels(digits):
    batch = next(digits.train(16, seed=0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "inputs": ((16, 32, 32, 1), np.uint8),
        "label": ((16,), np.int32),
    }


@pytest.mark.parametrize("batch_size", [1, 33, 280, 500])
def test_each_epoch_has_every_training_example_once_with_its_label_in_a_new_order(digits, batch_size):
    pixels, labels = digits.arrays("train")
    label_of = dict(zip(keys(pixels), labels, strict=True))
    batches = take(digits.train(batch_size, seed=1), -(-560 // batch_size))  # they follow each other without a gap
    seen = [key for batch in batches for key in keys(batch["inputs"])]
    assert [label_of[key] for key in seen] == np.concatenate([batch["label"] for batch in batches]).tolist()
    first, second = seen[:280], seen[280:560]
    assert sorted(first) == sorted(second) == sorted(label_of)
    assert first != second


def test_another_seed_gives_another_order(digits):
    first, second = (keys(next(digits.train(280, seed=seed))["inputs"]) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("start", [1, 7, 9, 100])
def test_a_resumed_stream_goes_on_exactly(digits_dir, start):
    assert_resumes(small(digits_dir, shift=2, flip=True), 33, start)


def test_a_batch_is_the_callers_to_change(digits):
    before = digits.arrays("train")[0].copy()
    next(digits.train(280, seed=0))["inputs"][:] = 0
    assert np.array_equal(digits.arrays("train")[0], before)


# -- splits and evaluation ----------------------------------------------------------------------------------------------


def test_train_and_validation_divide_the_training_images(digits, digits_dir):
    everything = small(digits_dir, validation=0).arrays("train")[0]
    train, validation = digits.arrays("train")[0], digits.arrays("validation")[0]
    assert sizes(digits) == [280, 20, 90]
    assert keys(train) + keys(validation) == keys(everything)


@pytest.mark.parametrize(("split", "size"), [("train", 280), ("validation", 20), ("test", 90)])
def test_evaluation_gives_each_example_once_in_order_and_pads_the_last_batch(digits, split, size):
    batches = list(digits.eval(split, 32))
    assert {(b["inputs"].shape, b["label"].shape, b["weight"].dtype) for b in batches} == {
        ((32, 32, 32, 1), (32,), np.dtype(np.float32))
    }
    weights = np.concatenate([b["weight"] for b in batches])
    assert weights.tolist() == [1.0] * size + [0.0] * (len(weights) - size)
    pixels, labels = digits.arrays(split)
    assert np.array_equal(np.concatenate([b["inputs"] for b in batches])[:size], pixels)
    assert np.array_equal(np.concatenate([b["label"] for b in batches])[:size], labels)


def test_evaluation_is_not_augmented(digits, digits_dir):
    assert_same_batches(digits.eval("test", 32), small(digits_dir, shift=2, flip=True).eval("test", 32))


def test_an_uncached_dataset_gives_the_same_batches_and_arrays_as_a_cached_one(digits_dir):
    cached, uncached = (small(digits_dir, shift=1, cache=cache) for cache in (True, False))
    assert_same_batches(take(cached.train(33, seed=0), 5), take(uncached.train(33, seed=0), 5))
    assert_same_batches(cached.eval("test", 32), uncached.eval("test", 32))
    whole = cached.arrays("test")
    for dataset in (small(digits_dir), cached, uncached):  # the first one has not loaded the split
        for few, everything in zip(dataset.arrays("test", limit=7), whole, strict=True):
            assert np.array_equal(few, everything[:7])


def test_images_are_resized_and_converted_as_configured(digits_dir):
    pixels, _ = small(digits_dir, image_size=16, channels=3).arrays("test")
    assert pixels.shape == (90, 16, 16, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


# -- mocks of cifar10 and imagenet2012 ----------------------------------------------------------------------------------


def test_a_mock_of_cifar10_trains_and_evaluates_in_colour(tmp_path):
    def make(split, i, rng):
        return {"id": f"{split}_{i}", "image": encoded(rng, (32, 32)), "label": i % 10}

    prepare_mock(str(tmp_path), cifar.Cifar10, {"train": 50, "test": 10}, make)
    dataset = data.open(DataConfig("cifar10", str(tmp_path), validation=10, channels=3, shift=4, flip=True))
    assert (dataset.num_classes, sizes(dataset)) == (10, [40, 10, 10])
    assert next(dataset.train(8, seed=0))["inputs"].shape == (8, 32, 32, 3)
    assert sorted(np.concatenate([b["label"] for b in dataset.eval("test", 5)]).tolist()) == list(range(10))


def test_a_mock_of_imagenet2012_has_its_validation_split_as_test(imagenet_dir):
    dataset = imagenet(imagenet_dir)
    assert (dataset.num_classes, dataset.class_names[0], sizes(dataset)) == (1000, "n01440764", [10, 2, 5])
    assert sum(b["weight"].sum() for b in dataset.eval("test", 4)) == 5
    assert (dataset.arrays("test")[1] >= 0).all()


def test_random_crops_are_new_in_each_epoch_and_a_resumed_stream_repeats_them(imagenet_dir):
    pixels = np.concatenate([b["inputs"] for b in take(imagenet(imagenet_dir).train(10, seed=0), 3)])
    assert pixels.shape == (30, 24, 24, 3)
    assert len(set(keys(pixels))) == 30
    assert_resumes(imagenet(imagenet_dir, flip=True), 4, 5)


# -- errors -------------------------------------------------------------------------------------------------------------


def test_more_validation_examples_than_there_are_is_refused(digits_dir):
    with pytest.raises(errors.ConfigError, match="must leave some of the 300"):
        small(digits_dir, validation=300)


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.train(0, seed=0),
        lambda d: d.train(4, seed=-1),
        lambda d: d.train(4, seed=2**32),
        lambda d: d.train(4, seed=0, start_step=-1),
        lambda d: d.eval("test", 0),
        lambda d: d.arrays("test", limit=0),
    ],
)
def test_an_argument_that_cannot_work_is_refused_before_the_first_batch(digits, call):
    with pytest.raises(errors.ConfigError, match="must be"):
        call(digits)


def test_a_mistyped_dataset_or_split_gets_the_nearest_name(digits, tmp_path):
    with pytest.raises(errors.UnknownNameError, match="did you mean 'cifar10'"):
        data.open(DataConfig("cifra10", str(tmp_path)))
    with pytest.raises(errors.UnknownNameError, match="did you mean 'validation'"):
        digits.eval("validaton", 8)


def test_a_validation_split_without_examples_is_a_data_error(digits_dir):
    with pytest.raises(errors.DataError, match="set validation above 0"):
        small(digits_dir, validation=0).num_examples("validation")


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "glue/mnli"])
def test_a_dataset_that_is_not_prepared_says_how_to_prepare_it(tmp_path, name):
    folder, vocabulary = tmp_path / "tfds", tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    of_texts = name.startswith("glue")
    config = TextConfig(name, str(folder), vocabulary=str(vocabulary)) if of_texts else DataConfig(name, str(folder))
    with pytest.raises(errors.DataError) as e:
        data.open(config)
    assert "pip install 'superserve-jax[prepare]'" in str(e.value)
    assert f"tfds.builder('{name}', data_dir='{folder}').download_and_prepare(file_format='array_record')" in str(e.value)
    for what in (str(folder / "downloads" / "manual"), "ILSVRC2012_img_train.tar"):
        assert (what in str(e.value)) == (name == "imagenet2012")


def test_a_dataset_stored_for_sequential_reading_is_a_data_error(digits_dir, tmp_path):
    folder = tmp_path / "cluttered_digits" / "1.0.0"
    shutil.copytree(f"{digits_dir}/cluttered_digits/1.0.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
    with pytest.raises(errors.DataError, match="is stored as tfrecord"):
        data.open(DataConfig(data_dir=str(tmp_path)))


def test_images_that_do_not_fit_into_memory_are_refused(digits, monkeypatch):
    monkeypatch.setattr(streams, "_MAX_MEMORY", 1000)
    with pytest.raises(errors.DataError, match="set cache=False"):
        digits.train(8, seed=0)
