"""Datasets for training. `open` reads the dataset of a config; `from_arrays` takes arrays of your own.

    dataset = data.open(data.DataConfig("cluttered_digits", shift=2))
    for batch in dataset.train(64, seed=0, start_step=1200):    # endless; batch k depends on (seed, k) alone
        batch["inputs"], batch["label"]                         # uint8 (B, H, W, C), int32 (B,)

Every dataset has the same three splits, whatever their source calls them. Models learn from `train`. Subnets are chosen on
`validation`, which is held out of the training examples. `test` gives the reported accuracies.

`streams.py` has the class `Dataset`: shuffled batches that a resumed run repeats exactly. The sources of examples are
`images.py` (TFDS and folders), `text.py` (TFDS) and `arrays.py`. This file opens a dataset by its config, writes the config as
JSON, and checks that a dataset fits a model.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from superserve_jax import errors
from superserve_jax.supernets import supernet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.training import fields
from superserve_jax.training.data import images, text
from superserve_jax.training.data.arrays import from_arrays
from superserve_jax.training.data.fingerprints import Fingerprinted
from superserve_jax.training.data.images import DataConfig, FolderConfig
from superserve_jax.training.data.streams import Dataset, DatasetLike
from superserve_jax.training.data.text import TextConfig

__all__ = [
    "AnyDataConfig",
    "DataConfig",
    "Dataset",
    "DatasetLike",
    "FolderConfig",
    "TextConfig",
    "from_arrays",
    "open",
]

AnyDataConfig = DataConfig | FolderConfig | TextConfig

_KINDS: dict[str, tuple[type, Any]] = {
    "images": (DataConfig, images.open),
    "folder": (FolderConfig, images.open_folder),
    "text": (TextConfig, text.open),
}


def open(config: AnyDataConfig) -> Dataset:
    """The dataset of a config. A dataset of our own is made first if it is not there yet.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: the dataset is missing, or does not hold what was asked.
    """
    return _KINDS[check_kind(config)][1](config)


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


def check_fit(dataset: DatasetLike, model: FamilyConfig) -> None:
    """Raises ConfigError unless a dataset's examples are valid inputs and labels of the network of a family's config."""
    if dataset.num_classes != model.num_classes:
        raise errors.ConfigError(
            f"model.num_classes is {model.num_classes}, but {dataset.name} has {dataset.num_classes} classes"
        )
    try:
        supernet.check_inputs(model, dataset.arrays("train", limit=1)[0])
    except errors.InputError as e:
        raise errors.ConfigError(f"the model does not take the inputs of {dataset.name}: {e}") from e
    if dataset.vocabulary is not None:
        dataset.vocabulary.check_fit(model)
