"""Whether data and model fit, and the values of a model that its data tells."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.supernets import supernet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.training.data import problems
from superserve_jax.training.data.streams import DatasetLike
from superserve_jax.training.template import ModelTemplate

AnyModel = FamilyConfig | ModelTemplate

_PIXELS = 100_000_000  # for mean and standard deviation; 8,000 images of 64x64 in colour
_DIGITS = 4


def mismatches(model: AnyModel | None, facts: Mapping[str, Any], name: str) -> list[str]:
    """The differences between the values of a model and those that its data needs.

    Args:
      model: the model, or None, which fits any data. A value that a template does not give fits, too.
      facts: the model's values as the data has them.
      name: the dataset's name in messages.

    >>> from superserve_jax.families.ofa_resnet import OFAResNetConfig
    >>> mismatches(OFAResNetConfig(), {"num_classes": 12, "channels": 3}, "pets")
    ['model.num_classes is 1000, but pets has 12 classes']
    """
    if model is None:
        return []
    given = model.given if isinstance(model, ModelTemplate) else {n: getattr(model, n) for n in model.__dataclass_fields__}
    found = []
    for field, value in facts.items():
        ours = given.get(field, value)
        if field == "vocab_size" and ours > value:
            continue  # the last rows of the embedding table are not used
        if ours != value:
            of = f"{name} has {value} classes" if field == "num_classes" else f"the inputs of {name} need {value}"
            found.append(f"model.{field} is {ours}, but {of}")
    return found


def facts_of(dataset: DatasetLike) -> dict[str, Any]:
    """The values of a model that the examples of a dataset tell, without the statistics of pixels."""
    inputs, _ = dataset.arrays("train", limit=1)
    facts: dict[str, Any] = {"num_classes": dataset.num_classes}
    if inputs.ndim == 4 and inputs.shape[1] == inputs.shape[2]:
        facts |= {"image_size": inputs.shape[1], "channels": inputs.shape[3]}
    if dataset.vocabulary is not None:
        facts |= {"vocab_size": len(dataset.vocabulary.tokens), "pad_id": dataset.vocabulary.pad_id}
        facts |= {"max_length": inputs.shape[1], "token_types": 1 if inputs.ndim == 2 else 2}
    return facts


def pixel_statistics(dataset: DatasetLike) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel over training images, scaled to 0..1. Empty unless pixels are uint8.

    Large datasets are sampled: the first images up to 100 million values.
    """
    first, _ = dataset.arrays("train", limit=1)
    if first.ndim != 4 or first.dtype != np.uint8:
        return {}
    inputs, _ = dataset.arrays("train", limit=max(1, _PIXELS // first[0].size))
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(inputs.shape[3]):
        share = np.bincount(inputs[..., channel].ravel(), minlength=256) / inputs[..., channel].size
        mean = float(share @ levels)
        means.append(round(mean, _DIGITS))
        deviations.append(round(max(float(share @ (levels - mean) ** 2) ** 0.5, 0.001), _DIGITS))  # 0 for images of one colour
    return {"mean": tuple(means), "std": tuple(deviations)}


def complete(model: AnyModel, dataset: DatasetLike, *, known: FamilyConfig | None = None) -> tuple[FamilyConfig, list[str]]:
    """The config of a model with the values that its data tells.

    Args:
      model: a family's config, which is returned as it is, or a template.
      dataset: the data.
      known: the config as an earlier start of the run completed it. Its values are taken, and no pixel is read again.

    Returns:
      The config, and the names of the fields that come from the data.
    """
    if not isinstance(model, ModelTemplate):
        return model, []
    missing = [name for name in model.__dataclass_fields__ if name not in model.given]
    if known is not None and type(known) is type(model.example):
        return model.fill({name: getattr(known, name) for name in missing}), missing
    facts = facts_of(dataset)
    if {"mean", "std"} & set(missing):
        facts |= pixel_statistics(dataset)
    return model.fill(facts), missing


def check(dataset: DatasetLike, model: FamilyConfig) -> None:
    """Raises ConfigError unless a dataset's examples are valid inputs and labels of the network of a family's config.

    One message lists everything that does not fit.
    """
    found = mismatches(model, facts_of(dataset), dataset.name)
    try:
        supernet.check_inputs(model, dataset.arrays("train", limit=1)[0])
    except errors.InputError as e:
        found.append(f"the model does not take the inputs of {dataset.name}: {e}")
    if dataset.vocabulary is not None:
        try:
            dataset.vocabulary.check_fit(model)
        except errors.ConfigError as e:
            found.append(str(e))
    problems.refuse("the model does not fit its data", found, kind=errors.ConfigError)
