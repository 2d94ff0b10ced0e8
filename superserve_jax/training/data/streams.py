"""Streams of batches out of examples of any kind: shuffled, repeated, resumable and padded; every batch reproducible.

A kind of dataset says how many examples a split has and how one is read; everything else is here. Examples lie in memory
(`Arrays`), or each is read when its turn comes (`Records`).
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from superserve_jax import errors
from superserve_jax.training import fields
from superserve_jax.vocabulary import Vocabulary

Split = Literal["train", "validation", "test"]
Batch = dict[str, np.ndarray]
Example = tuple[np.ndarray, int]  # input, label
SPLITS = ("train", "validation", "test")

# A finite stand-in for endless: grain's own breaks at batch size 1, where the number of batches overflows.
_EPOCHS = 2**31
_MAX_MEMORY = 8 * 2**30  # bytes of inputs


class Arrays:
    """A split in memory.

    Args:
      inputs, labels: (N, ...) and (N,).
      order: positions of the examples of this split, where it is not all of them in their own order.
    """

    threads = 1  # gathering costs a fraction of a millisecond: one thread keeps ahead and leaves the cores to XLA

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, *, order: np.ndarray | None = None):
        self._inputs, self._labels, self._order = inputs.view(), labels.astype(np.int32), order
        self._inputs.flags.writeable = self._labels.flags.writeable = False  # `load` gives them out

    def __len__(self) -> int:
        return len(self._labels if self._order is None else self._order)

    def load(self, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of the first `limit` examples, or of all; read-only where nothing had to be copied."""
        chosen = slice(limit) if self._order is None else self._order[:limit]
        return self._inputs[chosen], self._labels[chosen]

    def batches(self, order: grain.MapDataset, batch_size: int, *, seed: int | None = None) -> grain.MapDataset:
        """Batches of the examples at the positions that `order` gives."""
        return order.batch(batch_size, batch_fn=self._gather)

    def _gather(self, positions: Sequence[int]) -> Batch:
        chosen = np.array(positions) if self._order is None else self._order[np.array(positions)]
        return {"inputs": self._inputs[chosen], "label": self._labels[chosen]}


@dataclasses.dataclass(frozen=True)
class Records:
    """A split whose examples are read one by one, by several threads at once.

    Args:
      count: number of examples.
      read: the example at a position.
      spec: shape and dtype of an example's input.
      read_random: the same for training, with something random in it, such as a crop; `read` where it is left out.
    """

    count: int
    read: Callable[[int], Example]
    spec: tuple[tuple[int, ...], Any]
    read_random: Callable[[int, np.random.Generator], Example] | None = None

    @property
    def threads(self) -> int:
        """How many threads read."""
        return min(16, os.cpu_count() or 1)

    def __len__(self) -> int:
        return self.count

    def load(self, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of the first `limit` examples, or of all. Raises DataError where they would fill the memory."""
        count = self.count if limit is None else min(limit, self.count)
        shape, dtype = self.spec
        needed = count * int(np.prod(shape)) * np.dtype(dtype).itemsize
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
        """Batches of the examples at the positions that `order` gives, read with chance where there is a seed."""
        if seed is not None and self.read_random is not None:
            return order.random_map(self.read_random, seed=seed).batch(batch_size, batch_fn=_stack)
        return order.map(self.read).batch(batch_size, batch_fn=_stack)


class Dataset:
    """Batches of inputs and labels; made by `data.open` and `data.from_arrays`.

    Args:
      name: what messages call it; an attribute.
      splits: the examples of each split that there is.
      class_names: what each label means; an attribute, a tuple.
      cache: read a split once and keep it in memory.
      augment: changes a training batch by chance.
      vocabulary: of a dataset of texts; an attribute, None where inputs are no texts.
    """

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Arrays | Records],
        *,
        class_names: Sequence[str],
        cache: bool = True,
        augment: Callable[[Batch, np.random.Generator], Batch] | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        self.name = name
        self.class_names = tuple(class_names)
        self.vocabulary = vocabulary
        self._splits = dict(splits)
        self._cache = cache
        self._augment = augment

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def num_examples(self, split: Split) -> int:
        """Number of examples of a split."""
        return len(self._find(split))

    def train(self, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """An endless stream of training batches, shuffled anew each epoch; batch k depends on (seed, k) alone.

        Args:
          batch_size: B. A batch may begin in one epoch and end in the next.
          seed: 0 to 2^32 - 1.
          start_step: the first batch to give out: a resumed run sees exactly what it would have seen.

        Yields:
          {"inputs": (B, ...), "label": int32 (B,)}
        """
        fields.demand_whole("batch_size", batch_size, 1)
        fields.demand_whole("start_step", start_step, 0)
        fields.demand_whole("seed", seed, 0)
        if seed >= 2**32:
            raise errors.ConfigError(f"seed must be less than 2**32, got {seed}")
        shuffle_seed, read_seed, augment_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
        examples = self._examples("train")
        order = grain.MapDataset.range(len(examples)).shuffle(shuffle_seed).repeat(_EPOCHS)
        batches = examples.batches(order, batch_size, seed=read_seed)
        if self._augment:
            batches = batches.random_map(self._augment, seed=augment_seed)
        return iter(batches[start_step:].to_iter_dataset(_read_options(examples)))

    def eval(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All examples of a split once, in order, not augmented; the last batch is padded.

        Yields:
          {"inputs": (B, ...), "label": int32 (B,), "weight": float32 (B,)}; weight is 0 where there is only padding.
        """
        fields.demand_whole("batch_size", batch_size, 1)
        examples = self._examples(split)
        batches = examples.batches(grain.MapDataset.range(len(examples)), batch_size)
        return iter(batches.map(lambda batch: _pad(batch, batch_size)).to_iter_dataset(_read_options(examples)))

    def arrays(self, split: Split, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` examples of a split, or all: inputs (N, ...), labels int32 (N,).

        Read-only where the split is in memory, which a `limit` alone does not bring about.
        """
        if limit is not None:
            fields.demand_whole("limit", limit, 1)
        examples = self._examples(split) if limit is None else self._find(split)
        return examples.load(limit)

    def _examples(self, split: str) -> Arrays | Records:
        """The split, in memory where that is wanted."""
        examples = self._find(split)
        if self._cache and isinstance(examples, Records):
            examples = self._splits[split] = Arrays(*examples.load())
        return examples

    def _find(self, split: str) -> Arrays | Records:
        if split not in SPLITS:
            raise errors.unknown_name("split", split, SPLITS)
        if split not in self._splits:
            remedy = "set validation above 0" if split == "validation" else "choose another dataset"
            raise errors.DataError(f"dataset '{self.name}' has no {split} split here; {remedy}")
        return self._splits[split]


def num_kept(total: int, validation: int) -> int:
    """Number of training examples where the last `validation` of `total` are held out. Raises ConfigError if none are left.

    >>> num_kept(100, 20)
    80
    """
    if validation >= total:
        raise errors.ConfigError(f"validation must leave some of the {total:,} training examples, got {validation:,}")
    return total - validation


def fixed_order(total: int) -> np.ndarray:
    """A permutation of `total` positions that looks random and is always the same: raw bits of PCG64 never change.

    >>> sorted(fixed_order(4).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(np.random.PCG64(0).random_raw(total), kind="stable")


def _read_options(examples: Arrays | Records) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=examples.threads, prefetch_buffer_size=max(2, examples.threads))


def _stack(examples: Sequence[Example]) -> Batch:
    inputs, labels = zip(*examples, strict=True)
    return {"inputs": np.stack(inputs), "label": np.array(labels, np.int32)}


def _pad(batch: Batch, batch_size: int) -> Batch:
    missing = batch_size - len(batch["label"])
    padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
    return {**padded, "weight": np.pad(np.ones(batch_size - missing, np.float32), (0, missing))}
