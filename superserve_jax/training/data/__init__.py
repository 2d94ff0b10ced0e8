"""Datasets for training. `open` reads the dataset of a config; `from_arrays` takes arrays of your own.

    dataset = data.open(data.DataConfig("cluttered_digits", shift=2))
    for batch in dataset.train(64, seed=0, start_step=1200):    # endless; batch k depends on (seed, k) alone
        batch["inputs"], batch["label"]                         # uint8 (B, H, W, C), int32 (B,)

Every dataset has the same three splits, whatever their source calls them. Models learn from `train`. Subnets are chosen on
`validation`, which is held out of the training examples. `test` gives the reported accuracies: one half of it gives the
profiled accuracies of an export, a replay sends the other half (`halves.py`).

`streams.py` has the class `Dataset`: shuffled batches that a resumed run repeats exactly. The sources of examples are
`images.py` and `text.py` (TFDS), `folder.py` (images), `text_files.py` (CSV, TSV, JSON) and `arrays.py`. `fit.py` checks that
data and model fit. This file opens a dataset by its config, and writes the config as JSON.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from superserve_jax import errors
from superserve_jax.training import fields
from superserve_jax.training.data import folder, images, streams, text, text_files
from superserve_jax.training.data.arrays import from_arrays
from superserve_jax.training.data.fingerprints import Fingerprinted
from superserve_jax.training.data.fit import AnyModel
from superserve_jax.training.data.folder import FolderConfig
from superserve_jax.training.data.images import DataConfig, read_image
from superserve_jax.training.data.streams import Dataset, DatasetLike
from superserve_jax.training.data.text import TextConfig
from superserve_jax.training.data.text_files import TextFileConfig

__all__ = [
    "AnyDataConfig",
    "DataConfig",
    "Dataset",
    "DatasetLike",
    "FolderConfig",
    "TextConfig",
    "TextFileConfig",
    "describe",
    "from_arrays",
    "open",
    "read_image",
]

AnyDataConfig = DataConfig | FolderConfig | TextConfig | TextFileConfig

_KINDS: dict[str, tuple[type, Any]] = {
    "images": (DataConfig, images.open),
    "folder": (FolderConfig, folder.open),
    "text": (TextConfig, text.open),
    "text file": (TextFileConfig, text_files.open),
}
_OWN_FILES = ("folder", "text file")  # kinds that collect problems


def open(config: AnyDataConfig, model: AnyModel | None = None, *, decode: bool = True) -> Dataset:
    """The dataset of a config. A dataset of our own is made first if it is not there yet.

    Args:
      config: the config.
      model: the model to train on it. For the user's own files, what does not fit is in the message with other problems.
      decode: whether to decode all images of a `FolderConfig` first, so that every damaged one is in one message.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: the dataset is missing, or does not hold what was asked.
    """
    kind = check_kind(config)
    if isinstance(config, FolderConfig):
        return folder.open(config, model, decode=decode)
    open_kind = _KINDS[kind][1]
    return open_kind(config, model) if kind in _OWN_FILES else open_kind(config)


def describe(dataset: DatasetLike) -> str:
    """A dataset in one line: its name, its classes, and the number of examples in each split.

    >>> import numpy as np
    >>> x, y = np.zeros((10, 8, 8, 1), np.uint8), np.arange(10) % 2
    >>> describe(from_arrays(train=(x, y), test=(x, y), validation=4))
    'arrays: 2 classes; 6 examples for training, 4 for validation, 10 for testing'
    """
    purposes: dict[streams.Split, str] = {
        "train": "examples for training",
        "validation": "for validation",
        "test": "for testing",
    }
    counts = []
    for split, purpose in purposes.items():
        with contextlib.suppress(errors.DataError):  # the dataset has no such split
            counts.append(f"{dataset.num_examples(split):,} {purpose}")
    note = dataset.note if isinstance(dataset, Dataset) else ""
    return f"{dataset.name}: {dataset.num_classes} classes; {note or ', '.join(counts)}"


def fingerprint(dataset: DatasetLike) -> dict[str, Any]:
    """A JSON object that changes if a dataset changes, as far as the dataset can tell. See `fingerprints.py`."""
    own = dataset.fingerprint() if isinstance(dataset, Fingerprinted) else {}
    with errors.refusing(errors.ConfigError, f"fingerprint() of {dataset.name} must return a JSON object"):
        return json.loads(json.dumps({"training examples": dataset.num_examples("train"), **own}))


def data_to_json(config: AnyDataConfig) -> dict[str, Any]:
    """A dataset's config as a dict for `json.dump`. A `DataConfig` has no "kind", because it was the only kind at first."""
    kind = check_kind(config)
    return {**({} if kind == "images" else {"kind": kind}), **dataclasses.asdict(config)}


@errors.refusing(errors.ConfigError, "not the config of a dataset as data_to_json writes it")
def data_from_json(values: Mapping[str, Any]) -> AnyDataConfig:
    """The inverse of `data_to_json`. Raises UnknownNameError for an unknown kind or field."""
    kind = values.get("kind", "images")
    errors.check_name("kind of dataset", kind, list(_KINDS))
    return fields.read(_KINDS[kind][0], {key: value for key, value in values.items() if key != "kind"})


def check_kind(config: object) -> str:
    """The name of the config's kind of dataset. Raises ConfigError if it is not a dataset's config."""
    for kind, (config_class, _) in _KINDS.items():
        if isinstance(config, config_class):
            return kind
    known = ", ".join(config_class.__name__ for config_class, _ in _KINDS.values())
    raise errors.ConfigError(f"a dataset's config must be one of {known}, got {config!r}")
