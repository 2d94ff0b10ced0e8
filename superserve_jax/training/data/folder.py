"""A folder of images as a dataset.

    pets/train/cat/1.jpg  pets/train/dog/2.jpg  pets/val/cat/3.jpg  pets/test/dog/4.jpg

A class is named by its folder. All images are decoded once before training starts, so that every damaged file is known. Later
stages decode only the images that they use.
"""

import concurrent.futures
import dataclasses
import difflib
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from superserve_jax import errors, files, image_files, progress
from superserve_jax.training.data import fingerprints, fit, images, problems, splits
from superserve_jax.training.data.images import ImageConfig
from superserve_jax.training.data.streams import Dataset, Records
from superserve_jax.training.fields import Count

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_THREADS = min(16, os.cpu_count() or 1)
_NO_CLASSES = ("__MACOSX", "@eaDir")  # folders that archives and file servers add


@dataclasses.dataclass(frozen=True)
class File:
    """An image of a split.

    Args:
      path: the file.
      name: its path within the folder of its class.
      label: the position of its class in the list of classes.
    """

    path: pathlib.Path
    name: str
    label: int


@dataclasses.dataclass(frozen=True)
class FolderConfig(ImageConfig):
    """A folder PATH of images in PATH/train/CLASS, and if you have them in PATH/val/CLASS and PATH/test/CLASS.

    PATH may also hold the folders of the classes itself. A validation or test split without a folder is a tenth of the
    training images, at most 5,000: a random choice that is always the same. The config also has the fields of `ImageConfig`.

    Args:
      path: the folder; `~` is the user's home.
      validation: number of training images to hold out as the validation split. None: the folder val/, else a tenth.
      skip_bad: whether to leave out images that cannot be read. Otherwise they are an error, which lists them.

    >>> FolderConfig("~/pets", channels=3, image_size=64, flip=True).path
    '~/pets'
    """

    path: str = ""
    validation: Count | None = dataclasses.field(default=None, kw_only=True)
    skip_bad: bool = dataclasses.field(default=False, kw_only=True)


def open(config: FolderConfig, model: fit.AnyModel | None = None, *, decode: bool = True) -> Dataset:
    """The dataset of `config`.

    Args:
      config: the folder, and what happens to its images.
      model: the model to train. What does not fit it is listed with the other problems.
      decode: whether to decode all images now, to find the damaged ones. With `skip_bad` this always happens, because the
        splits depend on which images are left out.

    Raises:
      DataError: folders or images are missing, damaged, or do not fit the model. One message lists everything.
    """
    if not config.path:
        raise errors.ConfigError("data.path is not given; set it to your folder of images, for example --data.path ~/pets")
    root = files.user_path(config.path)
    folders, class_names, found = _layout(root)
    if config.validation is not None:
        folders.pop("validation", None)
    listed: dict[str, list[File]] = {}
    for split, folder in folders.items():
        listed[split], more = _files(root, folder, class_names)
        found += more
    facts = {"num_classes": len(class_names), "image_size": config.image_size, "channels": config.channels}
    found += fit.mismatches(model, facts, config.path)
    to_check = itertools.chain(*listed.values()) if decode or config.skip_bad else ()
    checked = _check(tuple(_stamp(file.path) for file in to_check))
    bad = {path: state for path, state in checked.items() if isinstance(state, str)}
    reasons = [f"{_shown(pathlib.Path(path), root)} {reason}" for path, reason in bad.items()]
    remedy = ""
    if bad and not config.skip_bad:
        found += [f"{reason}; replace or remove it" for reason in reasons]
        remedy = f"--data.skip-bad (skip_bad=True) leaves out images that cannot be read; here it is {len(bad)}"
    problems.refuse(config.path, found, remedy=remedy)
    problems.warn_left_out(f"{config.path}: {len(bad):,} images cannot be read and are left out", reasons)

    usable = {split: [file for file in group if str(file.path) not in bad] for split, group in listed.items()}
    names = {split: f"{folder.name}/" for split, folder in folders.items()}
    divided = splits.divide(usable, validation=config.validation, names=names)
    trained = {file.label for file in divided.splits["train"]}
    lost = [f"{name} has too few images to hold some out; add some" for i, name in enumerate(class_names) if i not in trained]
    problems.refuse(config.path, lost)
    records = {split: _records(config, group) for split, group in divided.splits.items()}

    def identity() -> dict[str, Any]:
        paths = {split: [(class_names[f.label], f.name, f.path) for f in group] for split, group in listed.items()}
        return fingerprints.of_files(paths)

    note = divided.note + _enlarged([side for side in checked.values() if isinstance(side, int)], config.image_size)
    return images.dataset_of(config, config.path, records, class_names, identity, note=note)


def _enlarged(sides: Sequence[int], image_size: int) -> str:
    """A note about images that are smaller than `image_size`; "" if there are none. `sides` are their shorter sides."""
    small = [side for side in sides if side < image_size]
    if not small:
        return ""
    pixels = f"{min(small)}" if min(small) == max(small) else f"{min(small)} to {max(small)}"
    return (
        f"; {len(small):,} of {len(sides):,} images are smaller ({pixels} pixels) and are enlarged to {image_size}, which "
        "--data.image-size sets"
    )


def _layout(root: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str], list[str]]:
    """The folder of each split, the names of the classes, and problems. Raises DataError if there are no classes at all."""
    inside = _folders(root)
    if not inside:
        state = "has no folders" if root.is_dir() else "is not a folder" if root.exists() else "does not exist"
        moved = "" if root.exists() else problems.MOVED
        raise errors.DataError(
            f"{root} {state}; put images into {root / 'train' / 'CLASS'}, one folder for each class (and into val/CLASS and "
            f"test/CLASS){moved}"
        )
    named, found = splits.find(inside)
    if named and "train" not in named:
        raise errors.DataError(
            f"{root} has {' and '.join(named.values())}, but no train; rename a folder, or move the classes"
        )
    folders = {split: root / name for split, name in named.items()} or {"train": root}
    classes = {split: _folders(folder) for split, folder in folders.items()}
    class_names = classes["train"]
    if not class_names:
        raise errors.DataError(
            f"{folders['train']} has no folders of classes; put images into {folders['train'] / 'CLASS'}, one folder for each "
            f"class"
        )
    if len(class_names) == 1:
        only = folders["train"] / class_names[0]
        hint = f"; if its folders are the classes, give {only} as the path" if _folders(only) else ""
        found.append(f"{_shown(only, root)} is the only class, and at least 2 are needed{hint}")
    for split in folders:
        for name in sorted(set(classes[split]) - set(class_names)):
            near = difflib.get_close_matches(name.lower(), [c.lower() for c in class_names], n=1)
            hint = f" (did you mean {next(c for c in class_names if c.lower() == near[0])}?)" if near else ""
            place, train = _shown(folders[split] / name, root), _shown(folders["train"], root)
            found.append(f"{place} is a class that {train} does not have{hint}")
    unusable = [name for name in class_names if not " ".join(name.split()).isprintable()]
    found += [f"{name!r} cannot be the name of a class; rename that folder" for name in unusable]
    return folders, class_names, found


def _folders(folder: pathlib.Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones. Links to folders count."""
    if not folder.is_dir():
        return []
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name[0] != "." and f.name not in _NO_CLASSES)


def _files(root: pathlib.Path, folder: pathlib.Path, class_names: list[str]) -> tuple[list[File], list[str]]:
    """The images of a split, in order of class and name, and problems."""
    found, odd, others = [], [], 0
    if loose := [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file() and f.name[0] != "."]:
        problems.warn_once(f"{folder}: {len(loose)} images are in no class and are ignored, such as {loose[0].name}")
    for label, name in enumerate(class_names):
        paths = sorted(_walk(folder / name, frozenset()))
        present = [path for path in paths if path.suffix.lower() in SUFFIXES]
        others += len(paths) - len(present)
        if not present and (folder / name).is_dir():
            odd.append(f"{_shown(folder / name, root)} has no images; known suffixes: {', '.join(SUFFIXES)}")
        for path in present:
            if path.is_file():
                found.append(File(path, str(path.relative_to(folder / name)), label))
            else:
                odd.append(f"{_shown(path, root)} is a pipe, a broken link or the like, not an image; replace or remove it")
    if others:
        problems.warn_once(f"{folder} holds {others} files without a suffix of {', '.join(SUFFIXES)}; they are ignored")
    return found, odd


def _walk(folder: pathlib.Path, above: frozenset[str]) -> Iterator[pathlib.Path]:
    """The files in a folder and its subfolders, without hidden ones. It follows links, but not to a folder that it is in."""
    here = os.path.realpath(folder)
    if here in above or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            if path.name[0] != "." and path.name not in _NO_CLASSES:
                yield from _walk(path, above | {here})
        elif path.name[0] != ".":
            yield path


def _shown(path: pathlib.Path, root: pathlib.Path) -> str:
    return str(path.relative_to(root)) if path != root else str(root)


def _stamp(path: pathlib.Path) -> tuple[str, int, int]:
    """Path, size and time of a file. If they are the same, the file is not decoded again."""
    try:
        stat = path.stat()
    except OSError:  # it has gone; reading it gives the reason
        return str(path), 0, 0
    return str(path), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=4)  # the stages of one program open the same folder several times
def _check(stamps: tuple[tuple[str, int, int], ...]) -> dict[str, int | str]:
    """For each path, the shorter side of its image in pixels, or the reason why the image cannot be read."""

    def check(stamp: tuple[str, int, int]) -> int | str:
        try:
            content = files.read_bytes(stamp[0])
        except OSError as e:
            return f"cannot be read: {e.strerror or e}"
        try:
            return min(image_files.decode(content, 1).shape[:2])
        except Exception as e:  # any exception: Pillow raises many kinds for damaged files
            return f"cannot be decoded: {image_files.reason(e)}"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        states = progress.track(pool.map(check, stamps), "checking images", total=len(stamps))
        return {path: state for (path, *_), state in zip(stamps, states, strict=True)}


def _records(config: FolderConfig, group: Sequence[File]) -> Records:
    def read(i: int) -> tuple[bytes, int]:
        file = group[i]
        try:
            return files.read_bytes(file.path), file.label
        except OSError as e:
            raise errors.DataError(f"{file.path} cannot be read: {e.strerror or e}; replace or remove it") from e

    return images.records_of(config, len(group), read, lambda i: str(group[i].path))
