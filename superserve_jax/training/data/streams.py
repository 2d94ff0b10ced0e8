"""Streams of batches: shuffled, repeated, resumable and padded; every batch is reproducible.

Each kind of dataset only provides the number of examples of a split and a function that reads one. Everything else is here.
The examples of a split are in memory (`Arrays`), or each one is read when it is needed (`Records`).
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import grain
import numpy as np

from superserve_jax import errors
from superserve_jax.training import fields
from superserve_jax.training.fields import BatchSize, Count, Positive, Seed
from superserve_jax.vocabulary import Vocabulary

Split = Literal["train", "validation", "test"]
Batch = dict[str, np.ndarray]
Example = tuple[np.ndarray, int]  # input, label
SPLITS = ("train", "validation", "test")

# Finite, since grain's endless repetition breaks at batch size 1, where the number of batches overflows.
_EPOCHS = 2**31
_MAX_MEMORY = 8 * 2**30  # bytes of inputs


class Arrays:
    """A split in memory.

    Args:
      inputs: the inputs (N, ...).
      labels: the labels (N,).
      order: positions of this split's examples, in order. None: all examples in their own order.
    """

    num_threads = 1  # Gathering a batch takes a fraction of a millisecond. One thread keeps ahead, and leaves cores to XLA.

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, *, order: np.ndarray | None = None):
        self._inputs, self._labels, self._order = inputs.view(), labels.astype(np.int32), order
        self._inputs.flags.writeable = self._labels.flags.writeable = False  # `load` hands them out

    def __len__(self) -> int:
        return len(self._labels if self._order is None else self._order)

    def load(self, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of the first `limit` examples, or of all; read-only if nothing had to be copied."""
        chosen = slice(limit) if self._order is None else self._order[:limit]
        return self._inputs[chosen], self._labels[chosen]

    def batches(self, order: grain.MapDataset, batch_size: int, *, seed: int | None = None) -> grain.MapDataset:
        """Batches of the examples at the positions in `order`."""
        return order.batch(batch_size, batch_fn=self._gather)

    def _gather(self, positions: Sequence[int]) -> Batch:
        chosen = np.array(positions) if self._order is None else self._order[np.array(positions)]
        return {"inputs": self._inputs[chosen], "label": self._labels[chosen]}


@dataclasses.dataclass(frozen=True)
class Records:
    """A split whose examples are read one by one, by several threads at once.

    Args:
      count: number of examples.
      read: reads the example at a position. With a random generator as second argument, it changes the example at random.
      spec: shape and dtype of one input.
      random: whether training reads with a random change, such as a crop.
    """

    count: int
    read: Callable[..., Example]
    spec: tuple[tuple[int, ...], Any]
    random: bool = False

    num_threads = min(16, os.cpu_count() or 1)

    def __len__(self) -> int:
        return self.count

    def load(self, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of the first `limit` examples, or of all. Raises DataError if they would fill the memory."""
        count = self.count if limit is None else min(limit, self.count)
        shape, dtype = self.spec
        needed = count * math.prod(shape) * np.dtype(dtype).itemsize
        if needed > _MAX_MEMORY:
            raise errors.DataError(
                f"{count:,} examples take {needed / 2**30:.0f} GiB in memory, more than {_MAX_MEMORY / 2**30:.0f}; "
                f"set cache=False, and give `arrays` a limit"
            )
        inputs, labels = np.empty((count, *shape), dtype), np.empty(count, np.int32)
        for i in range(count):
            inputs[i], labels[i] = self.read(i)
        return inputs, labels

    def batches(self, order: grain.MapDataset, batch_size: int, *, seed: int | None = None) -> grain.MapDataset:
        """Batches of the examples at the positions in `order`. A seed means training, with random changes."""
        changed = self.random and seed is not None
        examples = order.random_map(self.read, seed=seed) if changed else order.map(self.read)
        return examples.batch(batch_size, batch_fn=_stack)


@runtime_checkable
class DatasetLike(Protocol):
    """The interface of a dataset for training and the later stages. `Dataset` implements it; so can a class of your own.

    If it also has a method `fingerprint`, a run refuses to go on with changed data, see `fingerprints.py`.
    """

    name: str
    class_names: tuple[str, ...]
    vocabulary: Vocabulary | None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    def num_examples(self, split: Split) -> int:
        """See `Dataset.num_examples`."""
        ...

    def train(self, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """See `Dataset.train`."""
        ...

    def eval(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """See `Dataset.eval`."""
        ...

    def arrays(self, split: Split, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `Dataset.arrays`."""
        ...


@dataclasses.dataclass(eq=False)
class Dataset:
    """Batches of inputs and labels; made by `data.open` and `data.from_arrays`.

    Args:
      name: the dataset's name in messages.
      splits: the examples of each split.
      class_names: the name of each label.
      cache: whether to read a split once and keep it in memory.
      augment: returns a randomly changed training batch; None changes nothing.
      vocabulary: the vocabulary of a dataset of texts.
      identity: returns the dataset's fingerprint, see `fingerprints.py`.
      note: how the splits were made, for the line at the start of training.
    """

    name: str
    splits: dict[str, Arrays | Records]
    _: dataclasses.KW_ONLY
    class_names: tuple[str, ...]
    cache: bool = True
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None
    vocabulary: Vocabulary | None = None
    identity: Callable[[], Mapping[str, Any]] = dict
    note: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def fingerprint(self) -> Mapping[str, Any]:
        """A JSON object that changes if the examples change, see `fingerprints.py`."""
        return self.identity()

    def num_examples(self, split: Split) -> int:
        """Number of examples of a split."""
        return len(self._find(split))

    def train(self, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """An endless stream of training batches, shuffled anew each epoch; batch k depends on (seed, k) alone.

        Args:
          batch_size: B. A batch may begin in one epoch and end in the next.
          seed: seed of order and augmentation, from 0 to 2^32 - 1.
          start_step: number of batches to skip. A resumed run sees exactly the batches that it would have seen.

        Yields:
          {"inputs": (B, ...), "label": int32 (B,)}
        """
        fields.check_value("batch_size", batch_size, BatchSize)
        fields.check_value("start_step", start_step, Count)
        fields.check_value("seed", seed, Seed)
        shuffle_seed, read_seed, augment_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
        examples = self._examples("train")
        order = grain.MapDataset.range(len(examples)).shuffle(shuffle_seed).repeat(_EPOCHS)
        batches = examples.batches(order, batch_size, seed=read_seed)
        if self.augment:
            batches = batches.random_map(self.augment, seed=augment_seed)
        return iter(batches[start_step:].to_iter_dataset(_read_options(examples)))

    def eval(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All examples of a split once, in order, not augmented. The last batch is padded.

        Yields:
          {"inputs": (B, ...), "label": int32 (B,), "weight": float32 (B,)}; weight is 0 for padding, otherwise 1.
        """
        fields.check_value("batch_size", batch_size, BatchSize)
        examples = self._examples(split)
        batches = examples.batches(grain.MapDataset.range(len(examples)), batch_size)
        return iter(batches.map(lambda batch: _pad(batch, batch_size)).to_iter_dataset(_read_options(examples)))

    def arrays(self, split: Split, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` examples of a split, or all: inputs (N, ...), labels int32 (N,).

        They are read-only if the split is in memory. A call with a `limit` does not load the whole split.
        """
        fields.check_value("limit", limit, Positive | None)
        examples = self._examples(split) if limit is None else self._find(split)
        return examples.load(limit)

    def _examples(self, split: str) -> Arrays | Records:
        """The split, loaded into memory if the dataset caches."""
        examples = self._find(split)
        if self.cache and isinstance(examples, Records):
            examples = self.splits[split] = Arrays(*examples.load())
        return examples

    def _find(self, split: str) -> Arrays | Records:
        errors.check_name("split", split, SPLITS)
        if split not in self.splits:
            remedy = "set validation above 0" if split == "validation" else "choose another dataset"
            raise errors.DataError(f"dataset '{self.name}' has no {split} split here; {remedy}")
        return self.splits[split]


def num_kept(total: int, validation: int) -> int:
    """Number of training examples left if `validation` of `total` are held out. Raises ConfigError if none are left.

    >>> num_kept(100, 20)
    80
    """
    if validation >= total:
        raise errors.ConfigError(f"validation must leave some of the {total:,} training examples, got {validation:,}")
    return total - validation


def fixed_order(total: int) -> np.ndarray:
    """A random permutation of `total` positions that is the same everywhere: numpy never changes the raw bits of PCG64.

    >>> sorted(fixed_order(4).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(np.random.PCG64(0).random_raw(total), kind="stable")


def _read_options(examples: Arrays | Records) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=examples.num_threads, prefetch_buffer_size=max(2, examples.num_threads))


def _stack(examples: Sequence[Example]) -> Batch:
    inputs, labels = zip(*examples, strict=True)
    return {"inputs": np.stack(inputs), "label": np.array(labels, np.int32)}


def _pad(batch: Batch, batch_size: int) -> Batch:
    missing = batch_size - len(batch["label"])
    padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
    return {**padded, "weight": np.pad(np.ones(batch_size - missing, np.float32), (0, missing))}
