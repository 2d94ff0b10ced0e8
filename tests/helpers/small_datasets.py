"""Small datasets for tests, and checks of their batches."""

import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds


def prepare_mock(folder, builder_class, sizes, make, **options):
    """Prepares a TFDS dataset that has its real features, and examples made up here instead of downloaded ones.

    Args:
      folder: the TFDS folder to write to.
      builder_class: the real builder of the dataset.
      sizes: the number of examples of each split.
      make: `make(split, i, rng)` returns example i of a split.
      options: arguments of the builder.
    """

    def examples(split, count):
        rng = np.random.default_rng(count)
        return ((f"{split}{i}", make(split, i, rng)) for i in range(count))

    def splits(self, dl_manager):
        return {split: examples(split, count) for split, count in sizes.items()}

    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_class, "_split_generators", splits)
        builder_class(data_dir=folder, **options).download_and_prepare(file_format="array_record", download_config=offline)


def take(stream, count):
    """The first `count` batches of a stream."""
    return list(itertools.islice(stream, count))


def sizes(dataset):
    return [dataset.num_examples(split) for split in ("train", "validation", "test")]


def assert_same_batches(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)


def assert_resumes(dataset, batch_size, start):
    """Checks that a stream which resumes at step `start` has the batches of one that was never stopped."""
    whole = take(dataset.train(batch_size, seed=3), start + 3)
    assert_same_batches(take(dataset.train(batch_size, seed=3, start_step=start), 3), whole[start:])
