"""Fingerprints of datasets. With them, a run notices that its data has changed between two starts.

A fingerprint is a JSON object. It names no folder, so data may be moved or copied. Its content depends on the source:

- arrays: shape, dtype and SHA-256 of every array;
- a folder: for each class the number of files and bytes, and digests of the files' names, sizes and modification times;
- TFDS: name, version and checksums of the downloads; for each split its size, and a digest of the first example of each shard
  and of 16 more.
"""

import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from superserve_jax import errors

_CHUNK_BYTES = 1 << 24
_DIGEST = re.compile("[0-9a-f]{16,}")


@runtime_checkable
class Fingerprinted(Protocol):
    """A dataset with a fingerprint. A dataset class of your own may have this method, too."""

    def fingerprint(self) -> Mapping[str, Any]:
        """A JSON object that changes if the examples change."""
        ...


def sha256(arrays: Iterable[np.ndarray]) -> str:
    """The SHA-256 of the bytes of arrays. It copies at most one chunk of an array."""
    digest = hashlib.sha256()
    for array in arrays:
        if array.flags.c_contiguous:
            digest.update(_bytes(array))
        else:
            step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
            for start in range(0, len(array), step):
                digest.update(_bytes(np.ascontiguousarray(array[start : start + step])))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy. Python's buffers do not know bfloat16, so `array.data` would fail."""
    return array.reshape(-1).view(np.uint8).data


def of_array(array: np.ndarray) -> dict[str, Any]:
    """The fingerprint of one array."""
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256([array])}


def of_files(paths: Mapping[str, Sequence[tuple[str, str, pathlib.Path]]]) -> dict[str, Any]:
    """The fingerprint of files PATH/SPLIT/CLASS/NAME: one entry for each SPLIT/CLASS.

    Args:
      paths: (class, name, path) of each file of a split, ordered by class.
    """
    result = {}
    for split, files in paths.items():
        for folder, group in itertools.groupby(files, key=lambda file: file[0]):
            try:
                names, stats = zip(*((name, path.stat()) for _, name, path in group), strict=True)
            except OSError as e:
                raise errors.DataError(f"{e.filename} cannot be read: {e.strerror}; restore it, and start again") from e
            result[f"{split}/{folder}"] = {
                "files": len(names),
                "bytes": sum(s.st_size for s in stats),
                "names": _digest(names),
                "sizes": _digest(s.st_size for s in stats),
                "times": _digest(s.st_mtime_ns for s in stats),
            }
    return result


def of_examples(read: Callable[[int], tuple[np.ndarray, int]], total: int, starts: Iterable[int]) -> dict[str, Any]:
    """The fingerprint of a split whose examples are read one by one.

    Args:
      read: returns input and label at a position.
      total: number of examples.
      starts: positions that must be read, such as the first of each file.
    """
    spread = np.linspace(0, total - 1, min(total, 16)).astype(int).tolist()
    sample = itertools.chain.from_iterable(read(i) for i in sorted({*starts, *spread}))
    return {"examples": total, "sample": sha256(np.asarray(part) for part in sample)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two fingerprints differ, such as "train/cat: files 5 -> 6, names, sizes, times". Digests are only named."""
    here, inside = [], []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inside += differences(a, b, f"{prefix}{key}: ")
        elif a != b:
            here.append(" ".join(filter(None, (key, _change(a, b)))))
    return [prefix + ", ".join(here), *inside] if here else inside


def _change(a: Any, b: Any) -> str:
    if a is None or b is None:
        return "is new" if a is None else "is gone"
    digests = isinstance(a, str) and _DIGEST.fullmatch(a)
    return "" if digests or isinstance(a, Mapping) or isinstance(b, Mapping) else f"{a} -> {b}"


def _digest(values: Iterable[object]) -> str:
    return hashlib.sha256(b"\0".join(os.fsencode(str(v)) for v in values)).hexdigest()[:16]
