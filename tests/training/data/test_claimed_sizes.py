"""Arrays and configs that claim more than the memory holds are refused before memory is taken."""

import dataclasses
import tracemalloc

import bad
import numpy as np
import pytest
from noise import CONFIG

from superserve_jax import errors
from superserve_jax.training import data
from superserve_jax.training.config import SearchConfig
from superserve_jax.training.data.streams import Records

X, Y = np.zeros((6, 4), np.uint8), np.arange(6) % 3
MANY = 10**12


@pytest.fixture(autouse=True)
def little_memory():
    """Fails a test that takes long, or more than a few megabytes."""
    tracemalloc.start()
    with bad.within(120):
        yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def repeated(value, shape):
    """An array of this shape that takes no memory."""
    return np.broadcast_to(value, shape)


class Refuses:
    def __array__(self, *_, **__):
        raise RuntimeError("no array today")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        *(((repeated(np.zeros((), d), MANY), repeated(0, MANY)), f"{MANY:,} examples") for d in ("V0", "S0", "U0", "O")),
        *(((np.zeros(6, dtype), Y), "must be an array of numbers") for dtype in ("V0", "S0", "U0")),
        ((np.zeros((6, 0), np.uint8), Y), r"must have values, got uint8 of shape \(6, 0\)"),
        ((np.zeros((6, MANY, 0), np.uint8), Y), "must have values"),
        ((np.zeros((MANY, 0), np.uint8), repeated(0, MANY)), f"{MANY:,} examples"),
        ((repeated(np.uint8(1), (MANY, 4)), repeated(0, MANY)), f"{MANY:,} examples"),
        ((X, range(MANY)), f"{MANY:,} examples"),
        ((X, Y + MANY), rf"below 100,000; train has {MANY + 2}\. If they are ids, np\.unique"),
        ((X, Y.astype(np.uint64) + np.uint64(2**64 - 4)), r"train has 18446744073709551614"),
        ((X, Y - 5), "from 0 up, below 100,000; train has -5"),
        ((X, Y / 2), "labels of train must be integers"),
        ((X, Y == 1), "labels of train must be integers"),
        ((X, np.ma.masked_equal(Y, 1)), "train has a masked array; fill or drop"),
        ((np.ma.masked_equal(X, 1), Y), "train has a masked array; fill or drop"),
        ((Refuses(), Y), r"train has a Refuses that NumPy cannot make an array of: RuntimeError\('no array today'\)"),
        (([[1], [1, 2]], [0, 1]), "train has a list that NumPy cannot make an array of"),
    ],
)
def test_arrays_that_claim_too_much_are_refused(pair, message):
    with pytest.raises(errors.DataError, match=message):
        data.from_arrays(train=pair, test=(X, Y), validation=0)


def test_ids_as_labels_are_refused_if_classes_are_named_and_in_the_other_splits():
    for changes in ({"train": (X, Y + MANY), "class_names": "abc"}, {"test": (X, Y + MANY)}, {"validation": (X, Y + MANY)}):
        with pytest.raises(errors.DataError, match=f"labels must be from 0 to 2 .* has {MANY + 2}"):
            data.from_arrays(**{"train": (X, Y), "test": (X, Y), "validation": 2, **changes})


def test_the_remedy_for_ids_works():
    labels = np.unique(Y * MANY, return_inverse=True)[1]
    assert data.from_arrays(train=(X, labels), test=(X, labels), validation=2).num_classes == 3


@pytest.mark.parametrize("change", [{"batch_size": MANY}, {"search": {"latency_batch": MANY}}])
def test_an_impossible_batch_size_of_a_config_is_refused(change):
    with pytest.raises(errors.ConfigError, match="batch"):
        dataclasses.replace(CONFIG, **{k: SearchConfig(**v) if k == "search" else v for k, v in change.items()})


def test_a_stream_of_impossible_batches_is_refused():
    dataset = data.from_arrays(train=(X, Y), test=(X, Y), validation=2)
    for start in (lambda: dataset.train(MANY, seed=0), lambda: dataset.eval("test", MANY)):
        with pytest.raises(errors.ConfigError, match="batch_size must be int <= 1000000"):
            start()


def test_images_of_an_impossible_size_are_refused():
    """The number of bytes does not fit into 64 bits."""
    records = Records(3, lambda i: pytest.fail("read"), ((2**32, 2**32, 3), np.uint8))
    with pytest.raises(errors.DataError, match="GiB in memory"):
        records.load(1)
