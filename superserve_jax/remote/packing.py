"""The inputs and the outputs of a batch as one array each. One array is sent faster than many."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

_DECODERS = ThreadPoolExecutor(4, thread_name_prefix="superserve-decode")  # Pillow decodes without the interpreter's lock


class Packed(NamedTuple):
    """The inputs of a batch.

    Args:
      array: all inputs, stacked. If they differ in their first axis, one after another along it. With image files among them,
        the bytes of all, one after another.
      lengths: the length of each input in `array`, if they differ.
      files: which inputs are image files; empty if none is.
    """

    array: np.ndarray
    lengths: tuple[int, ...] = ()
    files: tuple[bool, ...] = ()


def pack(inputs: Sequence[np.ndarray], *, ndim: int | None = None) -> Packed:
    """Packs inputs that differ in their first axis at most.

    Args:
      inputs: the inputs.
      ndim: the number of axes of an input that is no image file. None: there are no image files.

    >>> pack([np.zeros(2), np.ones(3)])
    Packed(array=array([0., 0., 1., 1., 1.]), lengths=(2, 3), files=())
    """
    files = tuple(x.ndim != ndim for x in inputs) if ndim is not None else ()
    if any(files):
        parts = [x.reshape(-1) for x in inputs]
        return Packed(np.concatenate(parts), tuple(map(len, parts)), files)
    if len({x.shape for x in inputs}) == 1:
        return Packed(np.stack(inputs))
    return Packed(np.concatenate(inputs), tuple(map(len, inputs)))


def unpack(packed: Packed, shape: tuple[int, ...] = ()) -> list[np.ndarray]:
    """The inverse of `pack`. Arrays are views. Image files are decoded to inputs of `shape`.

    >>> [x.tolist() for x in unpack(pack([np.zeros(2), np.ones(3)]))]
    [[0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    array, lengths, files = packed
    parts = np.split(array, np.cumsum(lengths)[:-1]) if lengths else list(array)
    if not files:
        return parts
    from superserve_jax import image_files  # here, since it imports Pillow

    def decoded(x: np.ndarray, is_file: bool) -> np.ndarray:
        return image_files.from_file(x.tobytes(), shape) if is_file else x.reshape(shape)

    return list(_DECODERS.map(decoded, parts, files))


def pack_outputs(outputs: Sequence[Any]) -> Any:
    """Outputs as one array if they are arrays of one shape and dtype. Otherwise as a list.

    >>> pack_outputs([np.zeros(2), np.ones(2)]).shape, pack_outputs([(1, 2)])
    ((2, 2), [(1, 2)])
    """
    kinds = {(x.shape, x.dtype) if isinstance(x, np.ndarray) else None for x in outputs}
    return np.stack(outputs) if len(kinds) == 1 and None not in kinds else list(outputs)
