"""Text datasets by their TFDS name, as token ids.

`listops` is made on this machine and has its own vocabulary. Other texts are tokenized with a WordPiece vocabulary. The tasks
of GLUE are also read from local files of the Hugging Face Hub or of gluebenchmark.com.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from superserve_jax import errors, files
from superserve_jax.training import fields
from superserve_jax.training.data import streams
from superserve_jax.training.data.streams import Arrays, Dataset, Example, Records
from superserve_jax.training.datasets import glue, prepared
from superserve_jax.training.datasets.glue import Examples
from superserve_jax.training.datasets.listops import grammar
from superserve_jax.training.datasets.prepared import Stored
from superserve_jax.training.fields import Count, MaxLength
from superserve_jax.vocabulary import Vocabulary

# Names of features that hold one text or a pair of texts, as in GLUE (Wang et al., ICLR 2019). The first match counts.
_TEXTS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The config of a text dataset: which texts, and how they become token ids.

    Args:
      name: a TFDS name, such as "glue/mnli". `listops` is made at first use; other datasets must have been prepared.
      data_dir: where TFDS keeps its datasets; None means TFDS' own default, ~/tensorflow_datasets. For GLUE it may also be a
        folder with downloaded files, such as glue/sst2/train-00000-of-00001.parquet (see `datasets/glue.py`).
      validation: number of training examples, the last ones, that are held out as the validation split.
      max_length: number of tokens of an input. Shorter texts are padded, longer ones cut off.
      token_types: 2 adds to each token whether it belongs to the first or the second text of a pair; 1 does not.
      vocabulary: a WordPiece vocabulary file, such as BERT's vocab.txt; None for `listops`.
      lowercase: whether to lowercase texts and strip accents first, as BERT's uncased models do.

    >>> TextConfig("listops", max_length=32).token_types
    1
    """

    name: str = "listops"
    data_dir: str | None = None
    validation: Count = 1000
    max_length: MaxLength = 32
    token_types: Literal[1, 2] = 1
    vocabulary: str | None = None
    lowercase: bool = True

    def __post_init__(self):
        fields.check(self)
        prepared.check_name(self.name)
        if (self.vocabulary is None) != (self.name == "listops"):
            remedy = "leave it out" if self.vocabulary else "give the path of a WordPiece file, such as BERT's vocab.txt"
            raise errors.ConfigError(f"vocabulary of '{self.name}' is {self.vocabulary!r}; {remedy}")


def open(config: TextConfig) -> Dataset:
    """The dataset of `config`. A dataset of our own is made first if it is not there yet.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: it is not prepared, does not hold texts with labels, or the
        vocabulary cannot be read.
    """
    if config.vocabulary is None:
        words = Vocabulary(grammar.TOKENS, scheme="words")
    else:
        words = Vocabulary.read(config.vocabulary, lowercase=config.lowercase)
        words.encode([""], length=3)  # raises now if the package tokenizers is missing
    task = glue.task_of(config.name)
    if task is not None and (paths := glue.find(task, config.data_dir)):
        return _open_glue(config, words, task, paths)
    builder = prepared.load(config.name, config.data_dir)
    features = prepared.features(builder)
    texts = {key for key, feature in features.items() if isinstance(feature, tfds.features.Text)}
    keys = next((keys for keys in _TEXTS if texts.issuperset(keys)), None)
    if keys is None or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise errors.DataError(
            f"dataset '{config.name}' does not hold texts with class labels, it holds {sorted(features)}; choose one with a "
            f"ClassLabel named label, and with Text features named {' or '.join('+'.join(keys) for keys in _TEXTS)}"
        )

    stored = {
        ours: Stored(builder, theirs, label="label") for ours, theirs in prepared.splits(builder, config.validation).items()
    }

    def records(source: Stored) -> Records:
        def example(i: int) -> tuple[Sequence[str], int]:
            record = source[i]
            return [record[key].decode() for key in keys], record["label"]

        return _records(config, words, len(source), example)

    splits = {split: records(source) for split, source in stored.items()}

    def identity() -> dict[str, Any]:
        return {**prepared.identity(builder, stored, splits), "vocabulary": _digest(words)}

    class_names = tuple(features["label"].names)
    return Dataset(config.name, {**splits}, class_names=class_names, vocabulary=words, identity=identity)


def _open_glue(config: TextConfig, words: Vocabulary, task: str, paths: Mapping[str, Sequence[pathlib.Path]]) -> Dataset:
    """A task of GLUE from local files."""
    train, test = (glue.read(task, paths[split]) for split in ("train", "test"))
    kept = streams.num_kept(len(train.labels), config.validation)

    def records(source: Examples, start: int, stop: int) -> Records:
        return _records(config, words, stop - start, lambda i: (source.texts[start + i], source.labels[start + i]))

    splits: dict[str, Arrays | Records] = {
        "train": records(train, 0, kept),
        "test": records(test, 0, len(test.labels)),
    }
    if config.validation:
        splits["validation"] = records(train, kept, len(train.labels))

    def identity() -> dict[str, Any]:
        digests = {split: [files.sha256(path) for path in of_split] for split, of_split in paths.items()}
        return {"name": config.name, **digests, "held out": config.validation, "vocabulary": _digest(words)}

    names = glue.TASKS[task].class_names
    return Dataset(config.name, splits, class_names=names, vocabulary=words, identity=identity)


def _records(
    config: TextConfig, words: Vocabulary, count: int, example: Callable[[int], tuple[Sequence[str], int]]
) -> Records:
    """Examples that are tokenized when they are read. `example` returns the texts and the label at a position."""

    def read(i: int) -> Example:
        texts, label = example(i)
        inputs = words.encode(*([text] for text in texts), length=config.max_length, token_types=config.token_types)
        return inputs[0], label

    shape = (config.max_length,) if config.token_types == 1 else (config.max_length, 2)
    return Records(count, read, (shape, np.int32))


def _digest(words: Vocabulary) -> str:
    return hashlib.sha256(words.to_text().encode()).hexdigest()
