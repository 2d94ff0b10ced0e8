"""The user's own images: a folder of files, sorted into classes by folder.

PATH/train/cat/1.jpg    PATH/train/dog/7.png    ...
PATH/test/cat/9.jpg     PATH/test/dog/3.png     ...
"""

import dataclasses
import logging
import pathlib

from superserve_jax import errors
from superserve_jax.training.data import images, streams
from superserve_jax.training.data.images import Encoded, ImageConfig
from superserve_jax.training.data.streams import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

_log = logging.getLogger(__name__)


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


def open(config: FolderConfig) -> Dataset:
    """The dataset of `config`.

    Raises:
      DataError: folders or images are missing. For a file that cannot be decoded, it is raised when the file is read.
    """
    root = pathlib.Path(config.path).expanduser()
    train, test = root / "train", root / "test"
    class_names = _classes(train)
    if surplus := sorted(set(_classes(test)) - set(class_names)):
        raise errors.DataError(f"{test / surplus[0]} is a class that {train} does not have; its classes: {class_names}")
    files = _files(train, class_names)
    order = streams.fixed_order(len(files))
    kept = streams.num_kept(len(files), config.validation)
    splits = {"train": [files[i] for i in order[:kept]], "test": _files(test, class_names)}
    if config.validation:
        splits["validation"] = [files[i] for i in order[kept:]]
    encoded = {split: _encoded(listed) for split, listed in splits.items()}
    return images.dataset(config, config.path, encoded, class_names=class_names)


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
        files = sorted(f for f in (folder / name).glob("*") if f.is_file() and f.name[0] != ".")
        readable = [(f, label) for f in files if f.suffix.lower() in SUFFIXES]
        if not readable and (folder / name).is_dir():
            raise errors.DataError(f"{folder / name} has no images; known suffixes: {', '.join(SUFFIXES)}")
        found += readable
        others += len(files) - len(readable)
    if others:
        _log.warning("%s holds %d files without a suffix of %s; they are ignored", folder, others, ", ".join(SUFFIXES))
    return found


def _encoded(files: list[tuple[pathlib.Path, int]]) -> Encoded:
    def read(i: int) -> tuple[bytes, int]:
        path, label = files[i]
        try:
            return path.read_bytes(), label
        except OSError as e:
            raise errors.DataError(f"{path} cannot be read: {e.strerror}; replace or remove it") from e

    return Encoded(len(files), read, lambda i: str(files[i][0]))
