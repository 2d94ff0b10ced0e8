"""Image datasets, by TFDS name or from a folder; decoding, cropping and augmentation.

Pixels stay uint8. The model normalises them, so that serving cannot differ from training.
"""

import dataclasses
import io
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from superserve_jax import errors, files
from superserve_jax.training import fields
from superserve_jax.training.data import augment, fingerprints, streams
from superserve_jax.training.data.streams import Batch, Dataset, Example, Records
from superserve_jax.training.datasets import prepared
from superserve_jax.training.datasets.prepared import Stored
from superserve_jax.training.fields import Count, Positive

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What happens to images before the model sees them.

    Args:
      validation: number of training examples that are held out as the validation split.
      image_size: height and width in pixels. Images of another size are cropped at the centre and resized.
      channels: 1 for grey, 3 for RGB; images are converted.
      shift: training images are moved by up to this number of pixels; the gap is black.
      flip: whether to mirror half of the training images.
      random_crop: whether to take Inception's random crop for training, and the central 0.875 for evaluation, as is usual on
        ImageNet.
      cache: whether to decode a split once and keep it in memory as uint8. For small datasets.
    """

    validation: Count = 1000
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

    >>> DataConfig("cifar10", channels=3, shift=4, flip=True).image_size
    32
    """

    name: str = "cluttered_digits"
    data_dir: str | None = None

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

        return _records(config, len(source), read, lambda i: f"image {i} of '{config.name}', {source.split}")

    splits = {split: records(source) for split, source in stored.items()}
    return _dataset(config, config.name, splits, features[label].names, lambda: prepared.identity(builder, stored, splits))


def _dataset(
    config: ImageConfig,
    name: str,
    splits: Mapping[str, Records],
    class_names: Sequence[str],
    identity: Callable[[], Mapping[str, Any]],
) -> Dataset:
    change = augmentation(shift=config.shift, flip=config.flip)
    return Dataset(name, {**splits}, class_names=tuple(class_names), cache=config.cache, augment=change, identity=identity)


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


def _records(
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
            image = _decode(file, config.channels)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as e:  # SyntaxError: a broken PNG
            raise errors.DataError(f"{where(i)} cannot be decoded: {e}; replace or remove it") from e
        if rng is None:
            return augment.centre_crop(image, config.image_size, share=share), label
        return augment.random_resized_crop(image, config.image_size, rng), label

    shape = (config.image_size, config.image_size, config.channels)
    return Records(count, read, (shape, np.uint8), config.random_crop)


def _decode(file: bytes, channels: int) -> np.ndarray:
    """A PNG or JPEG as uint8 (H, W, C). The file may have other channels."""
    with PIL.Image.open(io.BytesIO(file)) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


# -- a folder of images ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FolderConfig(ImageConfig):
    """A folder PATH of images, PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg. A class is named by its folder.

    The validation split is a fixed random choice of the training images. The config also has the fields of `ImageConfig`.

    Args:
      path: the folder; `~` is the user's home.

    >>> FolderConfig("~/pets", channels=3, image_size=64, validation=200, flip=True).path
    '~/pets'
    """

    path: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not self.path:
            raise errors.ConfigError("path must be a folder that has train/ and test/, got ''")


def open_folder(config: FolderConfig) -> Dataset:
    """The dataset of `config`.

    Raises:
      DataError: folders or images are missing. For a file that cannot be decoded, it is raised when the file is read.
    """
    root = pathlib.Path(config.path).expanduser()
    train, test = root / "train", root / "test"
    class_names = _classes(train)
    if surplus := sorted(set(_classes(test)) - set(class_names)):
        raise errors.DataError(f"{test / surplus[0]} is a class that {train} does not have; its classes: {class_names}")
    listed = _files(train, class_names)
    order = streams.fixed_order(len(listed))
    kept = streams.num_kept(len(listed), config.validation)
    splits = {
        "train": [listed[i] for i in order[:kept]],
        "validation": [listed[i] for i in order[kept:]],
        "test": _files(test, class_names),
    }
    records = {split: _listed(config, found) for split, found in splits.items() if found}
    paths = {"train": [path for path, _ in listed], "test": [path for path, _ in splits["test"]]}
    return _dataset(config, config.path, records, class_names, lambda: fingerprints.of_files(paths))


def _classes(folder: pathlib.Path) -> list[str]:
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != ".") if folder.is_dir() else []
    if not names:
        raise errors.DataError(
            f"{folder} has no folders of classes; put images into {folder / 'CLASS'}, one folder for each class"
        )
    return names


def _files(folder: pathlib.Path, class_names: list[str]) -> list[tuple[pathlib.Path, int]]:
    """Path and label of every image."""
    found, others = [], 0
    for label, name in enumerate(class_names):
        present = sorted(f for f in (folder / name).glob("*") if f.name[0] != "." and not f.is_dir())
        readable = [(f, label) for f in present if f.suffix.lower() in SUFFIXES]
        if odd := next((f for f, _ in readable if not f.is_file()), None):
            raise errors.DataError(f"{odd} is a pipe, a broken link or the like, not an image; replace or remove it")
        if not readable and (folder / name).is_dir():
            raise errors.DataError(f"{folder / name} has no images; known suffixes: {', '.join(SUFFIXES)}")
        found += readable
        others += len(present) - len(readable)
    if others:
        _log.warning("%s holds %d files without a suffix of %s; they are ignored", folder, others, ", ".join(SUFFIXES))
    return found


def _listed(config: FolderConfig, listed: list[tuple[pathlib.Path, int]]) -> Records:
    def read(i: int) -> tuple[bytes, int]:
        path, label = listed[i]
        try:
            return files.read_bytes(path), label
        except OSError as e:
            raise errors.DataError(f"{path} cannot be read: {e.strerror or e}; replace or remove it") from e

    return _records(config, len(listed), read, lambda i: str(listed[i][0]))
