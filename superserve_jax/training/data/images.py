"""Image datasets by TFDS name; decoding, cropping and augmentation of any images.

Pixels stay uint8. The model normalises them, so that serving cannot differ from training.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from superserve_jax import errors, files, image_files
from superserve_jax.training import fields
from superserve_jax.training.data import augment
from superserve_jax.training.data.streams import Batch, Dataset, Example, Records
from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.prepared import Stored
from superserve_jax.training.fields import Count, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What happens to images before the model sees them.

    Args:
      image_size: height and width in pixels. Images of another size are cropped at the centre and resized.
      channels: 1 for grey, 3 for RGB; images are converted.
      shift: training images are moved by up to this number of pixels; the gap is black.
      flip: whether to mirror half of the training images.
      random_crop: whether to take Inception's random crop for training, and the central 0.875 for evaluation, as is usual on
        ImageNet.
      cache: whether to decode a split once and keep it in memory as uint8. For small datasets.
    """

    image_size: Positive = 32
    channels: Literal[1, 3] = 1
    shift: Count = 0
    flip: bool = False
    random_crop: bool = False
    cache: bool = True

    def __post_init__(self):
        fields.check(self)
        if self.shift >= self.image_size:
            raise errors.ConfigError(f"shift must be less than image_size={self.image_size}, got {self.shift}")
        if self.random_crop and self.cache:
            raise errors.ConfigError("random_crop=True needs whole images, but cache=True keeps cropped ones; set cache=False")


@dataclasses.dataclass(frozen=True)
class DataConfig(ImageConfig):
    """An image dataset of TFDS. It also has the fields of `ImageConfig`, which say what happens to the images.

    Args:
      name: a TFDS name. `cluttered_digits` is made at first use; other datasets must have been prepared.
      data_dir: where TFDS keeps its datasets; None means TFDS' own default, ~/tensorflow_datasets.
      validation: number of training examples, the last ones, that are held out as the validation split.

    >>> DataConfig("cifar10", channels=3, shift=4, flip=True).image_size
    32
    """

    name: str = "cluttered_digits"
    data_dir: str | None = None
    validation: Count = dataclasses.field(default=1000, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        prepared.check_name(self.name)


def open(config: DataConfig) -> Dataset:
    """The TFDS dataset of `config`. A dataset of our own is made first if it is not there yet.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: it is not prepared, or does not hold images with labels.
    """
    builder = prepared.load(config.name, config.data_dir)
    features, supervised = prepared.features(builder), builder.info.supervised_keys
    match supervised:
        case (str(image), str(label)):
            pass
        case _:
            image, label = "image", "label"
    wanted = (tfds.features.Image, tfds.features.ClassLabel)
    if not all(isinstance(features.get(key), kind) for key, kind in zip((image, label), wanted, strict=True)):
        raise errors.DataError(
            f"dataset '{config.name}' does not hold images with class labels, it holds {sorted(features)}; "
            f"choose one with an Image and a ClassLabel, such as cifar10"
        )

    # Decoded by us: TFDS would leave grey JPEGs grey, and decode differently where OpenCV happens to be installed.
    raw = {image: tfds.decode.SkipDecoding()}
    stored = {
        ours: Stored(builder, theirs, label=label, decoders=raw)
        for ours, theirs in prepared.splits(builder, config.validation).items()
    }

    def records(source: Stored) -> Records:
        def read(i: int) -> tuple[bytes, int]:
            record = source[i]
            return record[image], record[label]

        return records_of(config, len(source), read, lambda i: f"image {i} of '{config.name}', {source.split}")

    splits = {split: records(source) for split, source in stored.items()}
    return dataset_of(config, config.name, splits, features[label].names, lambda: prepared.identity(builder, stored, splits))


def dataset_of(
    config: ImageConfig,
    name: str,
    splits: Mapping[str, Records],
    class_names: Sequence[str],
    identity: Callable[[], Mapping[str, Any]],
    *,
    note: str = "",
) -> Dataset:
    """A dataset of images with the augmentation of `config`. See `Dataset` for the arguments."""
    change = augmentation(shift=config.shift, flip=config.flip)
    names = tuple(class_names)
    return Dataset(name, {**splits}, class_names=names, cache=config.cache, augment=change, identity=identity, note=note)


def augmentation(*, shift: int, flip: bool) -> Callable[[Batch, np.random.Generator], Batch] | None:
    """A function that moves and mirrors the images (B, H, W, C) of a batch at random; None if there is nothing to do."""

    def change(batch: Batch, rng: np.random.Generator) -> Batch:
        images = batch["inputs"]
        if shift:
            images = augment.shift(images, shift, rng)
        if flip:
            images = augment.flip(images, rng)
        return {**batch, "inputs": images}

    return change if shift or flip else None


def records_of(
    config: ImageConfig, count: int, read_file: Callable[[int], tuple[bytes, int]], where: Callable[[int], str]
) -> Records:
    """A split of uint8 images (H, W, C).

    Args:
      config: how to change the images.
      count: number of images.
      read_file: returns the file (PNG, JPEG, ...) and the label at a position.
      where: returns a description of the image at a position, for error messages.
    """
    share = augment.EVAL_SHARE if config.random_crop else 1.0

    def read(i: int, rng: np.random.Generator | None = None) -> Example:
        file, label = read_file(i)
        try:
            image = image_files.decode(file, config.channels)
        except Exception as e:  # any exception: Pillow raises many kinds for damaged files
            raise errors.DataError(f"{where(i)} cannot be decoded: {image_files.reason(e)}; replace or remove it") from e
        if rng is None:
            return image_files.centre_crop(image, config.image_size, share=share), label
        return augment.random_resized_crop(image, config.image_size, rng), label

    shape = (config.image_size, config.image_size, config.channels)
    return Records(count, read, (shape, np.uint8), config.random_crop)


def read_image(
    path: str | os.PathLike[str], *, image_size: int, channels: Literal[1, 3] = 3, share: float = 1.0
) -> np.ndarray:
    """An image file as an input of a model: cropped and scaled exactly as in evaluation.

    Args:
      path: the file.
      image_size: height and width in pixels, as in training.
      channels: 1 for grey, 3 for RGB, as in training.
      share: side of the crop, as part of the shorter side. It is 0.875 for a model that was trained with `random_crop`.

    Returns:
      uint8 (image_size, image_size, channels).

    Raises DataError if the file cannot be read or is not an image.

    >>> import tempfile
    >>> import PIL.Image
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     PIL.Image.new("RGB", (40, 30)).save(file.name)
    ...     read_image(file.name, image_size=16).shape
    (16, 16, 3)
    """
    try:
        image = image_files.decode(files.read_bytes(path), channels)
    except Exception as e:  # any exception: Pillow raises many kinds for damaged files
        raise errors.DataError(f"{path} cannot be read as an image: {image_files.reason(e)}; expected a PNG, JPEG, ...") from e
    return image_files.centre_crop(image, image_size, share=share)
