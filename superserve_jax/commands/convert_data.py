"""The options of `superserve convert DIRECTORY`, and the user's labelled texts or images that they name. See `convert.py`."""

import dataclasses
import pathlib
import tempfile

from superserve_jax import errors, files
from superserve_jax.convert import Pretrained
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.vit import ViTConfig
from superserve_jax.training import data, runs
from superserve_jax.training.config import TrainConfig
from superserve_jax.training.data import Dataset, FolderConfig, TextFileConfig


@dataclasses.dataclass(frozen=True)
class DirectoryOptions:
    """Options for a directory of Hugging Face.

    Args:
      images: for a classifier of images: a folder of labelled images, one folder for each class, by its name.
      texts: labelled texts: a file (.csv, .tsv, .jsonl, .parquet), or a folder with train.csv and test.csv.
      text: the name of the column of texts.
      second: the name of the column of second texts, for pairs.
      label: the name of the column of labels. A label is the name of a class or its number.
      candidates: number of subnets that the search tries.
      examples: number of texts or images on which the search compares subnets.
      workdir: the run's folder; runs/NAME with the directory's name if left out.
      max_length: the longest text in tokens, longer ones are cut; if left out, as many as model and tokenizer can take.
      image_size: height and width of images in pixels; if left out, those that the directory's image processor makes.
      depths: allowed numbers of layers; if left out, from half of them to all.
      heads: allowed numbers of attention heads of a layer; if left out, quarters of all heads.
      ffn: allowed numbers of feed-forward neurons of a layer; if left out, quarters of all neurons.
      json: write a description to this file.
    """

    images: pathlib.Path | None = None
    texts: pathlib.Path | None = None
    text: str = "text"
    second: str | None = None
    label: str = "label"
    candidates: int = 60
    examples: int = 1000
    workdir: pathlib.Path | None = None
    max_length: int | None = None
    image_size: int | None = None
    depths: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    ffn: tuple[int, ...] | None = None
    json: pathlib.Path | None = None


def config_of(found: Pretrained, options: DirectoryOptions, workdir: pathlib.Path) -> TextFileConfig | FolderConfig | None:
    """The config of the user's data; None without data. Raises an error for data of the other kind."""
    is_text = isinstance(found.config, DynaBERTConfig)
    if (options.images if is_text else options.texts) is not None:
        wrong, right, kind = ("--images", "--texts", "texts") if is_text else ("--texts", "--images", "images")
        raise errors.ConfigError(f"{wrong} does not fit: this network classifies {kind}; give {right}")
    if options.images is not None:
        return _image_config(found, options.images)
    return None if options.texts is None else _text_config(found, options.texts, options, workdir)


def _image_config(found: Pretrained, images: pathlib.Path) -> FolderConfig:
    config = found.config
    assert isinstance(config, ViTConfig)
    if config.channels not in (1, 3):
        raise errors.ConversionError(f"--images needs a network for 1 or 3 channels, got {config.channels}")
    return FolderConfig(
        str(files.user_path(images).absolute()),
        image_size=config.image_size,
        channels=1 if config.channels == 1 else 3,
        flip=True,
    )


def _text_config(found: Pretrained, texts: pathlib.Path, options: DirectoryOptions, workdir: pathlib.Path) -> TextFileConfig:
    """The config of the user's labelled texts. It reads the vocabulary from the run's folder, where it is not written yet."""
    config = found.config
    assert isinstance(config, DynaBERTConfig)
    if found.vocabulary is None:
        raise errors.ConversionError("--texts needs a tokenizer in the directory: tokenizer.json or vocab.txt; save it there")
    return TextFileConfig(
        str(files.user_path(texts).absolute()),
        text=options.text,
        second=options.second,
        label=options.label,
        class_names=found.class_names,
        max_length=config.max_length,
        token_types=2 if config.token_types > 1 else 1,
        vocabulary=str(workdir.absolute() / runs.VOCABULARY),
        lowercase=found.vocabulary.lowercase,
    )


def open(found: Pretrained, config: TrainConfig) -> tuple[Pretrained, Dataset]:
    """Opens the data before the run's folder is made. So data that cannot be used leaves no folder behind.

    Args:
      found: the classifier.
      config: the run's config, with data.

    Returns:
      The classifier, whose classes are in the order of the data, and the dataset.
    """
    if isinstance(config.data, FolderConfig):
        dataset = data.open(config.data, config.model)
        return found.with_classes(dataset.class_names), dataset
    assert found.vocabulary is not None
    assert isinstance(config.data, TextFileConfig)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / runs.VOCABULARY
        files.write_bytes(file, found.vocabulary.to_text().encode())
        return found, data.open(dataclasses.replace(config.data, vocabulary=str(file)), config.model)


def keep_vocabulary(found: Pretrained, workdir: pathlib.Path) -> None:
    """Writes the vocabulary of a classifier of texts into the run's folder, from which training reads it."""
    if found.vocabulary is not None:
        files.write_bytes(workdir / runs.VOCABULARY, found.vocabulary.to_text().encode())


def describe(found: Pretrained) -> str:
    """The inputs of a classifier in one line."""
    config = found.config
    if isinstance(config, ViTConfig):
        return f"inputs: raw images of {config.image_size}x{config.image_size} pixels, {config.channels} channels, uint8"
    assert isinstance(config, DynaBERTConfig)
    words = "none, so inputs are token ids" if found.vocabulary is None else f"{len(found.vocabulary.tokens):,} tokens"
    return f"vocabulary: {words}; texts of up to {config.max_length} tokens"
