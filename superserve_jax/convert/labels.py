"""The names of the classes in a config.json of Hugging Face."""

import pathlib
from collections.abc import Mapping

from superserve_jax import errors

_MOST_CLASSES = 100_000


def read(path: pathlib.Path, names: Mapping[str, str] | None, count: int | None) -> tuple[str, ...]:
    """The name of each class, in the order of the logits.

    Args:
      path: the file, for messages.
      names: the field `id2label`.
      count: the field `num_labels`; Hugging Face's default is 2.

    Raises:
      ConversionError: there are fewer than two classes, or their ids are not 0, 1, 2 and so on.
    """
    if names is None and count is not None and count > _MOST_CLASSES:
        raise errors.ConversionError(f"{path}: num_labels must be at most {_MOST_CLASSES:,}, got {count}; save it again")
    if names is None:
        names = {str(i): f"LABEL_{i}" for i in range(2 if count is None else count)}
    if len(names) < 2:
        raise errors.ConversionError(
            f"{path}: a classifier needs two or more labels, got {list(names.values())}; one label is a regression, which is "
            "not supported"
        )
    if len(names) > _MOST_CLASSES or set(names) != set(map(str, range(len(names)))):
        raise errors.ConversionError(f"{path}: id2label must number the labels from 0 up, got the ids {list(names)[:5]}")
    return tuple(names[str(i)] for i in range(len(names)))
