"""Streams of batches from a small cluttered_digits and from mocks of cifar10 and imagenet2012.

One file because every test reads the same small datasets.

The mocks are the real TFDS builders, with the features they have upstream, that yield random pictures instead of downloads.
"""

import io
import itertools
import shutil
import sys
import types

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from tensorflow_datasets.image_classification import cifar

from superserve_jax import errors
from superserve_jax.training import data
from superserve_jax.training.data import DataConfig, streams
from superserve_jax.training.data.images import from_builder

FEW = {"train": 300, "test": 90}
OFFLINE = tfds.download.DownloadConfig(try_download_gcs=False)


@pytest.fixture
def digits(digits_dir):
    return data.open(DataConfig(data_dir=digits_dir, validation=20))


def encoded(rng, size, *, mode="RGB", kind="png"):
    """A random picture of (width, height) as a file."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    file = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory):
    """A TFDS folder with a mock of cifar10: 50 + 10 random pictures."""

    def examples(prefix, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            yield i, {"id": f"{prefix}{i}", "image": encoded(rng, (32, 32)), "label": i % 10}

    def splits(self, dl_manager):
        return {"train": examples("train_", 50), "test": examples("test_", 10)}

    return prepare_mock(tmp_path_factory, cifar.Cifar10, splits)


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """A TFDS folder with a mock of imagenet2012: 12 + 5 random JPEGs of several sizes, and a test split without labels."""

    def examples(split, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            mode = "L" if i == 0 else "RGB"  # ImageNet has grey pictures
            image = encoded(rng, (40 + i, 60 - i), mode=mode, kind="jpeg")
            label = -1 if split == "test" else i * 80
            yield f"{split}{i}", {"file_name": f"{i}.JPEG", "image": image, "label": label}

    def splits(self, dl_manager):
        return {name: examples(name, count) for name, count in (("train", 12), ("validation", 5), ("test", 3))}

    return prepare_mock(tmp_path_factory, imagenet2012_dataset_builder.Builder, splits)


def prepare_mock(tmp_path_factory, builder_class, split_generators, file_format="array_record"):
    folder = str(tmp_path_factory.mktemp("tfds"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_class, "_split_generators", split_generators)
        builder_class(data_dir=folder).download_and_prepare(file_format=file_format, download_config=OFFLINE)
    return folder


def imagenet(folder, **changes):
    config = {"image_size": 24, "channels": 3, "validation": 2, "random_crop": True, "cache": False, **changes}
    return data.open(DataConfig("imagenet2012", folder, **config))


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


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


def test_every_training_example_is_seen_once_per_epoch_in_a_new_order(digits):
    pixels = np.concatenate([batch["inputs"] for batch in take(digits.train(40, seed=0), 14)])
    first, second = keys(pixels[:280]), keys(pixels[280:])
    assert sorted(first) == sorted(second) == sorted(keys(digits.arrays("train")[0]))
    assert first != second


@pytest.mark.parametrize("batch_size", [1, 33, 280, 500])
def test_epochs_follow_each_other_without_a_gap_at_any_batch_size(digits, batch_size):
    batches = take(digits.train(batch_size, seed=1), -(-560 // batch_size))
    pixels = np.concatenate([batch["inputs"] for batch in batches])[:560]
    assert sorted(keys(pixels)) == sorted(2 * keys(digits.arrays("train")[0]))


@pytest.mark.parametrize("start", [1, 7, 9, 100])
def test_a_resumed_stream_goes_on_exactly(digits_dir, start):
    dataset = data.open(DataConfig(data_dir=digits_dir, validation=20, shift=2, flip=True))
    whole = take(dataset.train(33, seed=3), start + 3)[start:]
    assert all(map(same, whole, take(dataset.train(33, seed=3, start_step=start), 3)))


def test_another_seed_gives_another_order(digits):
    first, second = (np.concatenate([b["inputs"] for b in take(digits.train(40, seed=s), 7)]) for s in (0, 1))
    assert sorted(keys(first)) == sorted(keys(second))
    assert keys(first) != keys(second)


def test_labels_stay_with_their_images(digits):
    labels = dict(zip(*(list(f(a)) for f, a in zip((keys, list), digits.arrays("train"), strict=True)), strict=True))
    for batch in take(digits.train(50, seed=0), 8):
        assert [labels[key] for key in keys(batch["inputs"])] == batch["label"].tolist()


def test_a_batch_is_the_callers_to_change(digits):
    before = digits.arrays("train")[0].copy()
    next(digits.train(280, seed=0))["inputs"][:] = 0
    assert np.array_equal(digits.arrays("train")[0], before)


# -- splits and evaluation ----------------------------------------------------------------------------------------------


def test_train_and_validation_divide_the_training_images(digits, digits_dir):
    everything = data.open(DataConfig(data_dir=digits_dir, validation=0)).arrays("train")[0]
    train, validation = digits.arrays("train")[0], digits.arrays("validation")[0]
    assert (digits.num_examples("train"), digits.num_examples("validation"), digits.num_examples("test")) == (280, 20, 90)
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
    shifting = data.open(DataConfig(data_dir=digits_dir, validation=20, shift=2, flip=True))
    assert all(map(same, digits.eval("test", 32), shifting.eval("test", 32)))


@pytest.mark.parametrize("cache", [True, False])
def test_arrays_can_be_limited(digits, digits_dir, cache):
    dataset = data.open(DataConfig(data_dir=digits_dir, validation=20, cache=cache))
    pixels, labels = dataset.arrays("test", limit=7)
    assert np.array_equal(pixels, digits.arrays("test")[0][:7])
    assert np.array_equal(labels, digits.arrays("test")[1][:7])


def test_an_uncached_dataset_gives_the_same_batches_as_a_cached_one(digits_dir):
    cached, uncached = (data.open(DataConfig(data_dir=digits_dir, validation=20, shift=1, cache=c)) for c in (True, False))
    assert all(map(same, take(cached.train(33, seed=0), 5), take(uncached.train(33, seed=0), 5)))
    assert all(map(same, cached.eval("test", 32), uncached.eval("test", 32)))


def test_images_are_resized_and_converted_as_configured(digits_dir):
    pixels, _ = data.open(DataConfig(data_dir=digits_dir, validation=20, image_size=16, channels=3)).arrays("test")
    assert pixels.shape == (90, 16, 16, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


# -- mocks of cifar10 and imagenet2012 ----------------------------------------------------------------------------------


def test_a_mock_of_cifar10_trains_and_evaluates_in_colour(cifar_dir):
    dataset = data.open(DataConfig("cifar10", cifar_dir, validation=10, channels=3, shift=4, flip=True))
    assert (dataset.num_classes, dataset.num_examples("train"), dataset.num_examples("test")) == (10, 40, 10)
    assert next(dataset.train(8, seed=0))["inputs"].shape == (8, 32, 32, 3)
    assert sorted(np.concatenate([b["label"] for b in dataset.eval("test", 5)]).tolist()) == list(range(10))


def test_a_mock_of_imagenet2012_has_its_validation_split_as_test(imagenet_dir):
    dataset = imagenet(imagenet_dir)
    assert (dataset.num_classes, dataset.class_names[0]) == (1000, "n01440764")
    assert (dataset.num_examples("train"), dataset.num_examples("validation"), dataset.num_examples("test")) == (10, 2, 5)
    assert sum(b["weight"].sum() for b in dataset.eval("test", 4)) == 5
    assert (dataset.arrays("test")[1] >= 0).all()


def test_random_crops_of_a_mock_of_imagenet2012_are_reproducible_and_resumable(imagenet_dir):
    dataset = imagenet(imagenet_dir, flip=True)
    whole = take(dataset.train(4, seed=0), 8)
    assert whole[0]["inputs"].shape == (4, 24, 24, 3)
    assert all(map(same, whole[5:], take(dataset.train(4, seed=0, start_step=5), 3)))


def test_the_same_picture_is_cropped_anew_each_epoch(imagenet_dir):
    pixels = np.concatenate([b["inputs"] for b in take(imagenet(imagenet_dir).train(10, seed=0), 3)])
    assert len(set(keys(pixels))) == 30


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be"),
        ({"name": "huggingface:mnist"}, "without a namespace"),
        ({"validation": -1}, "validation must be int >= 0, got -1"),
        ({"validation": 10.5}, "validation"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": float("nan")}, "image_size"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"shift": True}, "shift"),
        ({"shift": 32}, "shift must be less than image_size=32"),
        ({"flip": 1}, "flip must be bool, got 1"),
        ({"random_crop": True}, "set cache=False"),
    ],
)
def test_a_config_value_that_cannot_work_is_refused(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        DataConfig(**changes)


def test_more_validation_examples_than_there_are_is_refused(digits_dir):
    with pytest.raises(errors.ConfigError, match="must leave some of the 300"):
        data.open(DataConfig(data_dir=digits_dir, validation=300))


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


def test_a_mistyped_dataset_gets_the_nearest_name(tmp_path):
    with pytest.raises(errors.UnknownNameError, match="did you mean 'cifar10'"):
        data.open(DataConfig("cifra10", str(tmp_path)))


def test_a_mistyped_split_gets_the_nearest_name(digits):
    with pytest.raises(errors.UnknownNameError, match="did you mean 'validation'"):
        digits.eval("validaton", 8)


def test_a_validation_split_without_examples_is_a_data_error(digits_dir):
    dataset = data.open(DataConfig(data_dir=digits_dir, validation=0))
    with pytest.raises(errors.DataError, match="set validation above 0"):
        dataset.num_examples("validation")


def test_a_dataset_that_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(errors.DataError) as e:
        data.open(DataConfig("cifar10", str(tmp_path), channels=3))
    assert "pip install 'superserve-jax[prepare]'" in str(e.value)
    assert f"tfds.builder('cifar10', data_dir='{tmp_path}').download_and_prepare(file_format='array_record')" in str(e.value)


def test_imagenet2012_says_where_to_put_its_files(tmp_path):
    with pytest.raises(errors.DataError) as e:
        data.open(DataConfig("imagenet2012", str(tmp_path), channels=3))
    assert str(tmp_path / "downloads" / "manual") in str(e.value)
    assert "ILSVRC2012_img_train.tar" in str(e.value)


def test_a_dataset_stored_for_sequential_reading_is_a_data_error(digits_dir, tmp_path):
    folder = tmp_path / "cluttered_digits" / "1.0.0"
    shutil.copytree(f"{digits_dir}/cluttered_digits/1.0.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"fileFormat": "array_record"', '"fileFormat": "tfrecord"'))
    with pytest.raises(errors.DataError, match="is stored as tfrecord"):
        data.open(DataConfig(data_dir=str(tmp_path)))


def test_a_dataset_without_images_and_labels_is_a_data_error():
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features, supervised_keys=None))
    with pytest.raises(errors.DataError, match=r"holds \['text'\]"):
        from_builder(DataConfig("ag_news_subset"), builder)


def test_images_that_do_not_fit_into_memory_are_refused(digits, monkeypatch):
    monkeypatch.setattr(streams, "_MAX_MEMORY", 1000)
    with pytest.raises(errors.DataError, match="set cache=False"):
        digits.train(8, seed=0)
