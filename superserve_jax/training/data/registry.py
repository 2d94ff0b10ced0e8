"""Datasets of any kind as streams of batches: no TensorFlow, no network, every batch reproducible.

    dataset = data.open(data.DataConfig("cluttered_digits", shift=2))
    for batch in dataset.train(64, seed=0, start_step=1200):    # endless; batch k is a function of (seed, k) alone
        batch["inputs"], batch["label"]                          # uint8 (B, H, W, C), int32 (B,)

Kinds: images of TFDS (`DataConfig`), a folder of images (`FolderConfig`), texts of TFDS (`TextConfig`), and arrays of your own
(`from_arrays`). Three splits, whatever they are called elsewhere: `train` and `validation`, training examples that are held
out for choosing subnets; and `test`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.supernets import supernet
from superserve_jax.training import fields
from superserve_jax.training.data import folder, images, streams, text
from superserve_jax.training.data.streams import Arrays

Dataset = streams.Dataset
DataConfig = images.DataConfig
FolderConfig = folder.FolderConfig
TextConfig = text.TextConfig
Config = DataConfig | FolderConfig | TextConfig

_KINDS: dict[str, tuple[type, Any]] = {
    "images": (DataConfig, images.open),
    "folder": (FolderConfig, folder.open),
    "text": (TextConfig, text.open),
}


def open(config: Config) -> Dataset:
    """The dataset of a config, made first if it is our own and not there yet.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: it is not there, or does not hold what was asked.
    """
    return _KINDS[_kind(config)][1](config)


def from_arrays(
    *,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | int = 1000,
    class_names: Sequence[str] | None = None,
    shift: int = 0,
    flip: bool = False,
    name: str = "arrays",
) -> Dataset:
    """A dataset of the user's own arrays, which are not copied.

    Training examples are seen in a fixed random order first, since arrays are often sorted by class.

    Args:
      train: inputs (N, ...) of the shape and dtype that the model takes, and labels (N,), whole numbers from 0 up.
      test: the same for testing.
      validation: the same for choosing subnets, or the number of training examples to hold out for that.
      class_names: what each label means; the labels themselves if left out.
      shift, flip: of images, see `DataConfig`.
      name: what messages call it.

    Raises:
      DataError: the arrays do not fit together. ConfigError: too many examples would be held out, or an odd `shift`.

    >>> x, y = np.zeros((10, 8, 8, 1), np.uint8), np.arange(10) % 2
    >>> dataset = from_arrays(train=(x, y), test=(x, y), validation=4, class_names=("even", "odd"))
    >>> dataset.num_examples("train"), dataset.arrays("test")[0].shape
    (6, (10, 8, 8, 1))
    """
    given = {"train": train, "test": test}
    if not isinstance(validation, int):
        given["validation"] = validation
    arrays = {split: _pair(split, pair) for split, pair in given.items()}
    inputs, labels = arrays["train"]
    names = tuple(map(str, range(int(labels.max()) + 1))) if class_names is None else tuple(class_names)
    for split, (x, y) in arrays.items():
        if x.shape[1:] != inputs.shape[1:] or x.dtype != inputs.dtype:
            raise errors.DataError(
                f"inputs of {split} must be like those of train, {inputs.dtype} (N, {_join(inputs.shape[1:])}); got {x.dtype} "
                f"(N, {_join(x.shape[1:])})"
            )
        if y.min() < 0 or y.max() >= len(names):
            bad = int(y.min() if y.min() < 0 else y.max())
            raise errors.DataError(f"labels must be from 0 to {len(names) - 1} ({len(names)} classes); {split} has {bad}")
    fields.demand_whole("shift", shift, 0)
    if (shift or flip) and inputs.ndim != 4:
        raise errors.ConfigError(f"shift and flip are for images (N, H, W, C), got inputs of shape {inputs.shape}")
    splits = {split: Arrays(*pair, order=streams.fixed_order(len(pair[1]))) for split, pair in arrays.items()}
    splits["test"] = Arrays(*arrays["test"])
    if isinstance(validation, int):
        fields.demand_whole("validation", validation, 0)
        order, kept = streams.fixed_order(len(labels)), streams.num_kept(len(labels), validation)
        splits["train"] = Arrays(inputs, labels, order=order[:kept])
        if validation:
            splits["validation"] = Arrays(inputs, labels, order=order[kept:])
    return Dataset(name, splits, class_names=names, augment=images.augmentation(shift=shift, flip=flip))


def check_fit(dataset: Dataset, model: Any) -> None:
    """Raises ConfigError unless a dataset gives what the network of a family's config takes."""
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


def data_to_json(config: Config) -> dict[str, Any]:
    """A dataset's config as a dict for `json.dump`; a `DataConfig` has no "kind", as in runs from when there was no other."""
    kind = _kind(config)
    return {**({} if kind == "images" else {"kind": kind}), **dataclasses.asdict(config)}


@errors.refusing(errors.ConfigError, "not the config of a dataset as config_to_json gives it")
def data_from_json(values: Mapping[str, Any]) -> Config:
    """The inverse of `config_to_json`. Raises UnknownNameError for an unknown kind or field."""
    kind = values.get("kind", "images")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise errors.unknown_name("kind of dataset", kind, _KINDS)
    known = {f.name for f in dataclasses.fields(_KINDS[kind][0])}
    fields = {key: value for key, value in values.items() if key != "kind"}
    if surplus := sorted(set(fields) - known):
        raise errors.unknown_name(f"field of a config of {kind}", surplus[0], known)
    return _KINDS[kind][0](**fields)


def check_kind(config: Any) -> None:
    """Raises ConfigError for what is no dataset's config."""
    _kind(config)


def _kind(config: Any) -> str:
    for kind, (config_class, _) in _KINDS.items():
        if isinstance(config, config_class):
            return kind
    known = ", ".join(config_class.__name__ for config_class, _ in _KINDS.values())
    raise errors.ConfigError(f"a dataset's config must be one of {known}, got {config!r}")


def _pair(split: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of a split, each by itself and their lengths checked."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise errors.DataError(f"{split} must be a pair (inputs, labels) of arrays, got {type(pair).__name__}")
    inputs, labels = (np.asarray(part) for part in pair)
    if inputs.ndim == 0 or inputs.dtype.kind not in "buif":
        raise errors.DataError(f"inputs of {split} must be an array of numbers, got {inputs.dtype} of shape {inputs.shape}")
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise errors.DataError(
            f"labels of {split} must be whole numbers of shape (N,), got {labels.dtype} of shape {labels.shape}"
        )
    if len(inputs) != len(labels) or not len(labels):
        raise errors.DataError(f"{split} needs as many labels as inputs, got {len(labels)} for {len(inputs)}")
    return inputs, labels


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
