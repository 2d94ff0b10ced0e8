"""The files of MNIST: idx, packed with gzip or not. Everything in them is checked.

A header gives a type and the sizes of all axes, as big-endian numbers of 32 bits. The values follow, one byte each.
"""

import gzip
import hashlib
import io
import math
import struct
import zlib

import numpy as np

from superserve_jax import errors

_GZIP = b"\x1f\x8b"
_UINT8 = 8  # the code of the type
_MOST = 1_000_000  # items; a damaged header may claim billions


def read(content: bytes, name: str, *, item: tuple[int, ...]) -> np.ndarray:
    """The values of a file, uint8 (N, *item).

    Args:
      content: the bytes of the file.
      name: the file's name in messages.
      item: the expected shape of one item: (28, 28) for images, () for labels.

    Raises DataError if the file is damaged, or holds anything else.

    >>> read(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes([7, 2, 1]), "labels", item=())
    array([7, 2, 1], dtype=uint8)
    """
    wanted = f"an idx file of {_described(item)}"
    try:
        with gzip.open(io.BytesIO(content)) if content.startswith(_GZIP) else io.BytesIO(content) as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0":
                raise errors.DataError(
                    f"{name} is neither an idx file nor one packed with gzip: it begins with {start!r}. Expected {wanted}; "
                    f"download it again"
                )
            kind, axes = start[2:]
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            if kind != _UINT8 or not axes or shape[1:] != item:
                found = _described(shape[1:]) if axes else "no items"
                of = "" if kind == _UINT8 else f", of type {kind:#04x} instead of 0x08 (bytes)"
                raise errors.DataError(f"{name} holds {found}{of}. Expected {wanted}; check that the file has the right name")
            if not 0 < shape[0] <= _MOST:
                raise errors.DataError(f"{name} claims to hold {shape[0]:,} items, expected 1 to {_MOST:,}; download it again")
            size = math.prod(shape)
            values = file.read(size + 1)
    except (EOFError, OSError, struct.error, zlib.error) as e:
        raise errors.DataError(f"{name} is damaged: {errors.one_line(e)}. Expected {wanted}; download it again") from e
    if len(values) != size:
        count = f"more than the {size:,}" if len(values) > size else f"{len(values):,} instead of the {size:,}"
        raise errors.DataError(f"{name} is damaged: it has {count} bytes of its {shape[0]:,} items; download it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def md5(values: np.ndarray) -> str:
    """The MD5 of the unpacked file with these values."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, _UINT8, values.ndim, *values.shape)
    return hashlib.md5(header + values.tobytes(), usedforsecurity=False).hexdigest()


def _described(item: tuple[int, ...]) -> str:
    """What a file with items of this shape holds.

    >>> _described((28, 28)), _described(())
    ('images of 28x28', 'labels')
    """
    return f"images of {'x'.join(map(str, item))}" if item else "labels"
