"""Image datasets by their TFDS name, as streams of batches: no TensorFlow, no network, every batch reproducible.

    dataset = data.open(data.DataConfig("cluttered_digits", shift=2))
    for batch in dataset.train(64, seed=0, start_step=1200):    # endless; batch k is a function of (seed, k) alone
        batch["inputs"], batch["label"]                          # uint8 (B, H, W, C), int32 (B,)

Three splits, whatever TFDS calls them: `train` and `validation`, the last examples of TFDS' train split, held out for choosing
subnets; and `test`. Pixels stay uint8: normalising them belongs to the model, so that serving cannot differ from training.
"""

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from superserve_jax import errors
from superserve_jax.training import augment
from superserve_jax.training.datasets import prepared

Split = Literal["train", "validation", "test"]
Batch = dict[str, np.ndarray]
Example = dict[str, Any]
SPLITS = ("train", "validation", "test")

# Its split named test has no labels.
_TEST_SPLITS = {"imagenet2012": "validation"}
# A finite stand-in for endless: grain's own breaks at batch size 1, where the number of batches overflows.
_EPOCHS = 2**31
_MAX_MEMORY = 8 * 2**30  # bytes of decoded images


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and what happens to them before the model sees them.

    Args:
      name: a TFDS name; `cluttered_digits` is made at first use, others must have been prepared.
      data_dir: where TFDS keeps its datasets; None means TFDS' own default, ~/tensorflow_datasets.
      validation: number of training examples, the last ones, that are held out as the validation split.
      image_size: height and width of the images given out; others are resized and cropped at the centre.
      channels: 1 for grey, 3 for RGB; images are converted.
      shift: training images are moved by up to this number of pixels; black comes in from outside.
      flip: half of the training images are mirrored.
      random_crop: Inception's random crop for training and the central 0.875 for evaluation, as is usual on ImageNet.
      cache: decode a split once and keep it in memory, uint8. For small datasets.

    >>> DataConfig("cifar10", channels=3, shift=4, flip=True).image_size
    32
    """

    name: str = "cluttered_digits"
    data_dir: str | None = None
    validation: int = 1000
    image_size: int = 32
    channels: int = 1
    shift: int = 0
    flip: bool = False
    random_crop: bool = False
    cache: bool = True

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name or ":" in self.name:
            raise errors.ConfigError(
                f"name must be that of a TFDS dataset, like 'cifar10', without a namespace; got {self.name!r}"
            )
        for field, least in (("validation", 0), ("image_size", 1), ("shift", 0)):
            _check_int(field, getattr(self, field), least)
        if self.channels not in (1, 3):
            raise errors.ConfigError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels!r}")
        if self.shift >= self.image_size:
            raise errors.ConfigError(f"shift must be less than image_size={self.image_size}, got {self.shift}")
        for field in ("flip", "random_crop", "cache"):
            if not isinstance(getattr(self, field), bool):
                raise errors.ConfigError(f"{field} must be True or False, got {getattr(self, field)!r}")
        if self.random_crop and self.cache:
            raise errors.ConfigError("random_crop=True needs whole images, but cache=True keeps cropped ones; set cache=False")


def open(config: DataConfig) -> "Dataset":
    """The dataset of `config`, made first if it is our own and not there yet.

    Raises:
      UnknownNameError: TFDS knows no such dataset. DataError: it is not prepared, or does not hold images with labels.
    """
    return Dataset(config, prepared.load(config.name, config.data_dir))


class Dataset:
    """Batches of images and labels; made by `open`.

    Attributes:
      config: as given.
      name: of the dataset, for messages.
      class_names: what each label means.
    """

    def __init__(self, config: DataConfig, builder: tfds.core.DatasetBuilder):
        self.config = config
        self.name = config.name
        self._builder = builder
        self._image_key, self._label_key = _find_keys(config.name, builder)
        self.class_names: tuple[str, ...] = tuple(_features(builder)[self._label_key].names)
        self._splits = _find_splits(config, builder)
        self._cached: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def num_examples(self, split: Split) -> int:
        """Number of examples of a split."""
        return self._builder.info.splits[self._tfds_split(split)].num_examples

    def train(self, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """An endless stream of training batches, shuffled anew each epoch; batch k depends on (seed, k) alone.

        Args:
          batch_size: B. A batch may begin in one epoch and end in the next.
          seed: 0 to 2^32 - 1.
          start_step: the first batch to give out: a resumed run sees exactly what it would have seen.

        Yields:
          {"inputs": uint8 (B, H, W, C), "label": int32 (B,)}
        """
        _check_int("batch_size", batch_size, 1)
        _check_int("start_step", start_step, 0)
        _check_int("seed", seed, 0)
        if seed >= 2**32:
            raise errors.ConfigError(f"seed must be less than 2**32, got {seed}")
        shuffle_seed, crop_seed, augment_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
        examples = self._references("train").shuffle(shuffle_seed).repeat(_EPOCHS)
        if self.config.random_crop:
            examples = examples.random_map(self._decode_random_crop, seed=crop_seed)
        batches = self._batch(examples, "train", batch_size)
        if self.config.shift or self.config.flip:
            batches = batches.random_map(self._augment, seed=augment_seed)
        return iter(batches[start_step:].to_iter_dataset(self._read_options()))

    def eval(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All examples of a split once, in order, not augmented; the last batch is padded.

        Yields:
          {"inputs": uint8 (B, H, W, C), "label": int32 (B,), "weight": float32 (B,)}; weight is 0 where there is only padding.
        """
        _check_int("batch_size", batch_size, 1)
        batches = self._batch(self._references(split), split, batch_size)
        return iter(batches.map(lambda batch: _pad(batch, batch_size)).to_iter_dataset(self._read_options()))

    def arrays(self, split: Split, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first `limit` examples of a split, or all: images uint8 (N, H, W, C), labels int32 (N,).

        Read-only where the split is cached, which a `limit` alone does not bring about.
        """
        if limit is not None:
            _check_int("limit", limit, 1)
        if self.config.cache and (limit is None or split in self._cached):
            pixels, labels = self._cache(split)
            return pixels[:limit], labels[:limit]
        source = self._source(split)
        wanted = range(len(source) if limit is None else min(limit, len(source)))
        self._check_memory(len(wanted))
        batch = _stack([self._decode(source[i]) for i in wanted])
        return batch["inputs"], batch["label"]

    # -- from the records on disk to batches ----------------------------------------------------------------------------

    def _tfds_split(self, split: str) -> str:
        if split not in SPLITS:
            raise errors.unknown_name("split", split, SPLITS)
        if split not in self._splits:
            remedy = "set validation above 0" if split == "validation" else "choose another dataset"
            raise errors.DataError(f"dataset '{self.config.name}' has no {split} split here; {remedy}")
        return self._splits[split]

    def _source(self, split: str) -> Any:
        # Decoded by us: TFDS would leave grey JPEGs grey, and decode differently where OpenCV happens to be installed.
        raw = {self._image_key: tfds.decode.SkipDecoding()}
        builder: Any = self._builder
        return builder.as_data_source(self._tfds_split(split), decoders=raw)

    def _references(self, split: str) -> grain.MapDataset:
        """What is shuffled: indices into the cache, or the encoded records."""
        if self.config.cache:
            return grain.MapDataset.range(len(self._cache(split)[1]))
        return grain.MapDataset.source(self._source(split))

    def _batch(self, examples: grain.MapDataset, split: str, batch_size: int) -> grain.MapDataset:
        if self.config.cache:
            pixels, labels = self._cache(split)
            return examples.batch(batch_size, batch_fn=lambda i: {"inputs": pixels[np.array(i)], "label": labels[np.array(i)]})
        decoded = examples if split == "train" and self.config.random_crop else examples.map(self._decode)
        return decoded.batch(batch_size, batch_fn=_stack)

    def _decode(self, record: Example) -> Example:
        share = augment.EVAL_SHARE if self.config.random_crop else 1.0
        pixels = augment.centre_crop(self._pixels(record), self.config.image_size, share=share)
        return {"inputs": pixels, "label": np.int32(record[self._label_key])}

    def _decode_random_crop(self, record: Example, rng: np.random.Generator) -> Example:
        pixels = augment.random_resized_crop(self._pixels(record), self.config.image_size, rng)
        return {"inputs": pixels, "label": np.int32(record[self._label_key])}

    def _pixels(self, record: Example) -> np.ndarray:
        """The stored image, PNG or JPEG, as uint8 (H, W, C), whatever channels it was stored with."""
        with PIL.Image.open(io.BytesIO(record[self._image_key])) as image:
            pixels = np.asarray(image.convert("L" if self.config.channels == 1 else "RGB"))
        return pixels.reshape(*pixels.shape[:2], self.config.channels)

    def _augment(self, batch: Batch, rng: np.random.Generator) -> Batch:
        pixels = batch["inputs"]
        if self.config.shift:
            pixels = augment.shift(pixels, self.config.shift, rng)
        if self.config.flip:
            pixels = augment.flip(pixels, rng)
        return {**batch, "inputs": pixels}

    def _cache(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        if split not in self._cached:
            source, size = self._source(split), self.config.image_size
            self._check_memory(len(source))
            pixels = np.empty((len(source), size, size, self.config.channels), np.uint8)
            labels = np.empty(len(source), np.int32)
            for i in range(len(source)):
                example = self._decode(source[i])
                pixels[i], labels[i] = example["inputs"], example["label"]
            pixels.flags.writeable = labels.flags.writeable = False  # `arrays` gives them out
            self._cached[split] = pixels, labels
        return self._cached[split]

    def _check_memory(self, examples: int) -> None:
        needed = examples * self.config.image_size**2 * self.config.channels
        if needed > _MAX_MEMORY:
            raise errors.DataError(
                f"{examples:,} images of '{self.config.name}' take {needed / 2**30:.0f} GiB decoded, more than "
                f"{_MAX_MEMORY / 2**30:.0f}; set cache=False, and give `arrays` a limit"
            )

    def _read_options(self) -> grain.ReadOptions:
        # Cached batches cost a fraction of a millisecond: one thread keeps ahead and leaves the cores to XLA.
        threads = 1 if self.config.cache else min(16, os.cpu_count() or 1)
        return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))


def _features(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
    features: Any = builder.info.features
    return dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}


def _find_keys(name: str, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """The features that hold the image and the label."""
    features, supervised = _features(builder), builder.info.supervised_keys
    match supervised:
        case (str(image), str(label)):
            pass
        case _:
            image, label = "image", "label"
    wanted = (tfds.features.Image, tfds.features.ClassLabel)
    if not all(isinstance(features.get(key), kind) for key, kind in zip((image, label), wanted, strict=True)):
        raise errors.DataError(
            f"dataset '{name}' is not one of images with class labels: it holds {sorted(features)}; "
            f"choose one with an Image and a ClassLabel, such as cifar10"
        )
    return image, label


def _find_splits(config: DataConfig, builder: tfds.core.DatasetBuilder) -> dict[str, str]:
    """What each of our splits is in TFDS' language."""
    stored = builder.info.splits
    if "train" not in stored:
        raise errors.DataError(f"dataset '{config.name}' has no train split, only {sorted(stored)}; choose another dataset")
    held_out, total = config.validation, stored["train"].num_examples
    if held_out >= total:
        raise errors.ConfigError(f"validation must leave some of the {total:,} training examples, got {held_out:,}")
    splits = {"train": f"train[:{total - held_out}]"}
    if held_out:
        splits["validation"] = f"train[{total - held_out}:]"
    for test in (_TEST_SPLITS.get(builder.name, "test"), "validation"):
        if test in stored:
            return {**splits, "test": test}
    return splits


def _stack(examples: Sequence[Example]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in ("inputs", "label")}


def _pad(batch: Batch, batch_size: int) -> Batch:
    missing = batch_size - len(batch["label"])
    padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
    return {**padded, "weight": np.pad(np.ones(batch_size - missing, np.float32), (0, missing))}


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise errors.ConfigError(f"{name} must be a whole number from {least} up, got {value!r}")
