"""MNIST and Fashion-MNIST: TFDS's own builders get their examples from the four idx files, without TensorFlow.

TFDS itself needs TensorFlow for two things: to read these files and to encode the images. `builder` does both with NumPy and
Pillow. Name, version, features, pixels, labels and order are the same, so `tfds.data_source` finds the dataset as if TFDS had
prepared it with TensorFlow. (`tfds.load` reads no array_record, whoever wrote it.)
"""

import hashlib
import http.client
import io
import logging
import math
import pathlib
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from superserve_jax import errors, files, progress
from superserve_jax.training.datasets import idx
from superserve_jax.training.datasets.logged import Logged

_log = logging.getLogger(__name__)

NAMES = ("mnist", "fashion_mnist")

_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
FILES = tuple(f"{names[split]}.gz" for split in ("train", "test") for names in (_IMAGES, _LABELS))
"""The names of the four files."""

_OFFICIAL_COUNTS = {"train": 60_000, "test": 10_000}
MNIST_MD5 = {  # of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_ITEM = (28, 28)
_CLASSES = 10
_MOST_BYTES = 2**30  # of a file
_BLOCK = 2**20
_TIMEOUT_S = 60.0


class Examples(NamedTuple):
    """A split: images uint8 (N, 28, 28), and labels uint8 (N,)."""

    images: np.ndarray
    labels: np.ndarray


def read_folder(name: str, folder: str) -> dict[str, Examples]:
    """The examples of each split from the four files in a folder, packed with gzip or not.

    Files that differ from the official ones give a warning: by their number of examples, and those of mnist by their MD5.
    Fashion-MNIST is also in use in another order.

    Raises DataError if a file is missing, damaged or does not fit the others, or if the files are those of another dataset.
    """
    path = files.user_path(folder)
    if not path.is_dir():
        raise errors.DataError(f"{path} is no folder; give the folder that holds {', '.join(FILES)}")
    paths = {}
    for file in FILES:
        packed, unpacked = path / file, path / file.removesuffix(".gz")
        paths[file] = unpacked if unpacked.exists() and not packed.exists() else packed
    if missing := [file for file, p in paths.items() if not p.exists()]:
        names = sorted(p.name for p in path.iterdir())
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise errors.DataError(f"{path} has no {', '.join(missing)}; it has {shown or 'no files'}. Put the four files there")
    contents = {}
    for file, p in paths.items():
        try:
            contents[file] = files.read_bytes(p, most=_MOST_BYTES)
        except OSError as e:
            raise errors.DataError(f"{p} cannot be read: {e.strerror or e}; expected a file of {name}") from e
    splits = _parse(contents, {file: str(p) for file, p in paths.items()})
    _compare_with_official(name, splits, path)
    return splits


def download(name: str) -> dict[str, Examples]:
    """The examples of each split from the addresses that TFDS knows, checked with its SHA-256.

    Raises DataError if a file cannot be downloaded, or is not the one that TFDS expects.
    """
    infos: Mapping[str, Any] = tfds.builder_cls(name).url_infos or {}
    contents = {url: bytearray() for url in infos}
    total = sum(math.ceil(info.size / _BLOCK) for info in infos.values())
    for _ in progress.track(_fetch(name, infos, contents), f"downloading {name} (MiB)", total=total):
        pass
    for url, content in contents.items():
        if (found := hashlib.sha256(content).hexdigest()) != infos[url].checksum:
            raise errors.DataError(
                f"{url} is another file today: SHA-256 {found}, expected {infos[url].checksum}. {_by_hand(name)}"
            )
    return _parse({url.rsplit("/", 1)[-1]: bytes(content) for url, content in contents.items()}, {})


def builder(name: str, splits: Mapping[str, Examples], data_dir: str | None) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a dataset, which makes these examples without TensorFlow.

    Args:
      name: one of `NAMES`.
      splits: the examples of "train" and "test".
      data_dir: where TFDS keeps its datasets; None means TFDS' own default.
    """
    official: Any = tfds.builder_cls(name)

    class FromExamples(Logged, official, skip_registration=True):  # type: ignore[call-arg]
        __module__ = official.__module__  # a part of the dataset's description
        name = official.name

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            images, labels = splits[split]
            # TFDS orders the examples by these keys. They are those of the official builder.
            for index in progress.track(range(len(labels)), f"making {self.name}, {split}"):
                png = io.BytesIO()
                PIL.Image.fromarray(images[index]).save(png, format="png")
                yield index, {"image": png.getvalue(), "label": int(labels[index])}

    make: Any = FromExamples
    return make(data_dir=data_dir)


def how_to_prepare(name: str, command: str) -> str:
    """What to do if a dataset is not prepared, for an error message. `command` prepares it."""
    return f"Prepare it once, which needs no TensorFlow:\n  {command}\nThis downloads it. {_by_hand(name)}"


def _by_hand(name: str) -> str:
    return f"Or get {', '.join(FILES)} in another way, and give their folder: superserve prepare {name} --files FOLDER"


def _fetch(name: str, infos: Mapping[str, Any], contents: Mapping[str, bytearray]) -> Iterator[None]:
    """Appends to `contents` what the addresses have, block by block."""
    for url, content in contents.items():
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
                while len(content) <= infos[url].size and (block := response.read(_BLOCK)):
                    content += block
                    yield
        except (OSError, http.client.HTTPException) as e:
            raise errors.DataError(
                f"{url} cannot be downloaded: {errors.one_line(e)}. Check the connection. {_by_hand(name)}"
            ) from e


def _parse(contents: Mapping[str, bytes], paths: Mapping[str, str]) -> dict[str, Examples]:
    """The examples of each split.

    Args:
      contents: the bytes of each file, by its name in `FILES`.
      paths: how messages call a file, if not by this name.
    """
    splits = {}
    for split in _IMAGES:
        image_file, label_file = f"{_IMAGES[split]}.gz", f"{_LABELS[split]}.gz"
        image_path, label_path = paths.get(image_file, image_file), paths.get(label_file, label_file)
        images = idx.read(contents[image_file], image_path, item=_ITEM)
        labels = idx.read(contents[label_file], label_path, item=())
        if len(images) != len(labels):
            raise errors.DataError(
                f"{image_path} has {len(images):,} images, but {label_path} has {len(labels):,} labels. Expected one label "
                f"for each image; take both files from the same source"
            )
        if (wrong := np.flatnonzero(labels >= _CLASSES)).size:
            raise errors.DataError(
                f"{label_path} has the label {labels[wrong[0]]} at position {wrong[0]}. Expected 0 to {_CLASSES - 1}; "
                f"download it again"
            )
        splits[split] = Examples(images, labels)
    return splits


def _compare_with_official(name: str, splits: Mapping[str, Examples], folder: pathlib.Path) -> None:
    """Reports how the files of a folder differ from the official ones. Raises DataError for files of MNIST in its place."""
    for split, expected in _OFFICIAL_COUNTS.items():
        if (count := len(splits[split].labels)) != expected:
            _log.warning("%s has %s examples in its split %s; the official dataset has %s", folder, count, split, expected)
    arrays = {_IMAGES[split]: examples.images for split, examples in splits.items()}
    arrays |= {_LABELS[split]: examples.labels for split, examples in splits.items()}
    differing = [file for file, values in arrays.items() if idx.md5(values) != MNIST_MD5[file]]
    if name != "mnist" and len(differing) < len(arrays):
        raise errors.DataError(
            f"{folder} has files of mnist, by their MD5. Expected those of {name}, whose names are the same; give another "
            f"folder, or: superserve prepare mnist --files {folder}"
        )
    if name == "mnist" and differing:
        _log.warning(
            "%s in %s: not the official files of mnist, by their MD5; check that they are not those of another dataset",
            ", ".join(sorted(differing)),
            folder,
        )
    elif name == "mnist":
        _log.info("the files in %s are the official ones of mnist, by their MD5", folder)
