"""The user's own arrays as a dataset."""

import hashlib
from collections.abc import Sequence, Sized
from typing import Any, Literal

import numpy as np

from superserve_jax import errors
from superserve_jax.training import fields
from superserve_jax.training.data import fingerprints, images, streams
from superserve_jax.training.data.streams import Arrays, Dataset, Records
from superserve_jax.training.fields import Count, MaxLength
from superserve_jax.vocabulary import Vocabulary

Pair = tuple[np.ndarray, np.ndarray]

_MAX_EXAMPLES = 2**28  # of a split; order and labels then take 6 GB
_MAX_CLASSES = 100_000  # larger labels are most likely ids


def from_arrays(
    *,
    train: Pair,
    test: Pair,
    validation: Pair | int = 1000,
    class_names: Sequence[str] | None = None,
    shift: int = 0,
    flip: bool = False,
    name: str = "arrays",
    vocabulary: Vocabulary | None = None,
    max_length: int = 128,
    token_types: Literal[1, 2] = 1,
) -> Dataset:
    """A dataset of the user's own arrays, which are not copied.

    Training examples are put into a fixed random order first, because arrays are often sorted by class.

    Args:
      train: inputs (N, ...) with the shape and dtype that the model takes, and labels (N,), integers from 0 up.
      test: inputs and labels for testing.
      validation: inputs and labels for choosing subnets, or the number of training examples to hold out for that.
      class_names: the name of each label; the numbers themselves if left out.
      shift: training images are moved by up to this number of pixels.
      flip: whether to mirror half of the training images.
      name: the dataset's name in messages.
      vocabulary: for texts. Inputs are then texts, pairs of texts, or token ids. The export keeps it, for `model.encode`.
      max_length: number of tokens of a text. Shorter texts are padded, longer ones cut off.
      token_types: 2 adds to each token whether it belongs to the first or the second text of a pair; 1 does not.

    Raises:
      DataError: the arrays do not fit together. ConfigError: an option that cannot work, such as holding out all examples.

    >>> x, y = np.zeros((10, 8, 8, 1), np.uint8), np.arange(10) % 2
    >>> dataset = from_arrays(train=(x, y), test=(x, y), validation=4, class_names=("even", "odd"))
    >>> dataset.num_examples("train"), dataset.arrays("test")[0].shape
    (6, (10, 8, 8, 1))
    """
    fields.check_value("max_length", max_length, MaxLength)
    pairs = {"train": train, "test": test, **({} if isinstance(validation, int) else {"validation": validation})}
    if vocabulary is not None:
        pairs = {split: _encoded(split, pair, vocabulary, max_length, token_types) for split, pair in pairs.items()}
    arrays = {split: _checked(split, pair) for split, pair in pairs.items()}
    inputs, labels = arrays["train"]
    names = _numbered(labels) if class_names is None else tuple(class_names)
    for split, (x, y) in arrays.items():
        if x.shape[1:] != inputs.shape[1:] or x.dtype != inputs.dtype:
            raise errors.DataError(f"inputs of {split} must be like inputs of train, {_like(inputs)}; got {_like(x)}")
        if y.min() < 0 or y.max() >= len(names):
            bad = int(y.min() if y.min() < 0 else y.max())
            raise errors.DataError(f"labels must be from 0 to {len(names) - 1} ({len(names)} classes); {split} has {bad}")
    fields.check_value("shift", shift, Count)
    if (shift or flip) and inputs.ndim != 4:
        raise errors.ConfigError(f"shift and flip are for images (N, H, W, C), got inputs of shape {inputs.shape}")
    order = streams.fixed_order(len(labels))
    splits: dict[str, Arrays | Records] = {"test": Arrays(*arrays["test"])}
    if isinstance(validation, int):
        fields.check_value("validation", validation, Count)
        kept = streams.num_kept(len(labels), validation)
        order, held_out = order[:kept], order[kept:]
        if validation:
            splits["validation"] = Arrays(inputs, labels, order=held_out)
    else:
        x, y = arrays["validation"]
        splits["validation"] = Arrays(x, y, order=streams.fixed_order(len(y)))
    splits["train"] = Arrays(inputs, labels, order=order)

    def identity() -> dict[str, Any]:
        parts = {s: {"inputs": fingerprints.of_array(x), "labels": fingerprints.of_array(y)} for s, (x, y) in arrays.items()}
        words = {} if vocabulary is None else {"vocabulary": hashlib.sha256(vocabulary.to_text().encode()).hexdigest()}
        return {**parts, **words, "held out": len(labels) - len(order), "shift": shift, "flip": flip}

    augment = images.augmentation(shift=shift, flip=flip)
    return Dataset(name, splits, class_names=names, augment=augment, identity=identity, vocabulary=vocabulary)


def _encoded(split: str, pair: Any, vocabulary: Vocabulary, max_length: int, token_types: int) -> Any:
    """A pair whose inputs are token ids, if they were texts or pairs of texts. Anything else is returned as it is."""
    if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], Sequence | np.ndarray) or not len(pair[0]):
        return pair
    inputs, labels = pair
    if isinstance(inputs[0], str):
        columns = [list(inputs)]
    elif len(np.shape(inputs[0])) == 1 and isinstance(inputs[0][0], str):
        with errors.refusing(errors.DataError, f"inputs of {split} must be texts, or pairs of texts"):
            first, second = zip(*inputs, strict=True)
        columns = [list(first), list(second)]
    else:
        return pair
    with errors.refusing(errors.DataError, f"inputs of {split} must be texts, or pairs of texts"):
        return vocabulary.encode(*columns, length=max_length, token_types=token_types), labels


def _numbered(labels: np.ndarray) -> tuple[str, ...]:
    """The names "0", "1", ... of the classes that `labels` have."""
    if labels.min() < 0 or labels.max() >= _MAX_CLASSES:
        bad = int(labels.min() if labels.min() < 0 else labels.max())
        raise errors.DataError(
            f"labels must number the classes from 0 up, below {_MAX_CLASSES:,}; train has {bad}. If they are ids, "
            f"np.unique(labels, return_inverse=True) numbers them"
        )
    return tuple(map(str, range(int(labels.max()) + 1)))


def _checked(split: str, pair: Any) -> Pair:
    """Inputs and labels of a split, if they are arrays of the same length. Takes no memory for arrays."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise errors.DataError(f"{split} must be a pair (inputs, labels) of arrays, got {type(pair).__name__}")
    inputs, labels = (_as_array(split, part) for part in pair)
    if inputs.ndim == 0 or inputs.dtype.kind not in "buif":
        hint = "; for texts, give a vocabulary" if inputs.dtype.kind == "U" else ""
        raise errors.DataError(
            f"inputs of {split} must be an array of numbers, got {inputs.dtype} of shape {inputs.shape}{hint}"
        )
    if not all(inputs.shape[1:]):
        raise errors.DataError(f"every input of {split} must have values, got {inputs.dtype} of shape {inputs.shape}")
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise errors.DataError(f"labels of {split} must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}")
    if len(inputs) != len(labels) or not len(labels):
        raise errors.DataError(f"{split} needs as many labels as inputs, got {len(labels)} for {len(inputs)}")
    return inputs, labels


def _as_array(split: str, values: Any) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray):
        raise errors.DataError(f"{split} has a masked array; fill or drop its masked values, for example by .filled(0)")
    try:
        if isinstance(values, Sized) and len(values) > _MAX_EXAMPLES:
            raise errors.DataError(f"{split} has {len(values):,} examples, more than the {_MAX_EXAMPLES:,} that are possible")
        return np.asarray(values)
    except errors.DataError:
        raise
    except Exception as e:  # any exception: the conversion may be the user's code
        raise errors.DataError(f"{split} has a {type(values).__name__} that NumPy cannot make an array of: {e!r}") from e


def _like(inputs: np.ndarray) -> str:
    """Dtype and shape of inputs, such as "uint8 (N, 9, 9, 1)"."""
    return f"{inputs.dtype} (N, {', '.join(map(str, inputs.shape[1:]))})"
