"""The inputs and the outputs of a batch as one array each. One array is sent faster than many."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Packed(NamedTuple):
    """The inputs of a batch.

    Args:
      array: all inputs, stacked. If they have several lengths, one after another along their first axis.
      lengths: the length of each input, if they have several.
    """

    array: np.ndarray
    lengths: tuple[int, ...] = ()


def pack(inputs: Sequence[np.ndarray]) -> Packed:
    """Packs inputs that differ in their first axis at most.

    >>> pack([np.zeros(2), np.ones(3)])
    Packed(array=array([0., 0., 1., 1., 1.]), lengths=(2, 3))
    """
    if len({x.shape for x in inputs}) == 1:
        return Packed(np.stack(inputs))
    return Packed(np.concatenate(inputs), tuple(map(len, inputs)))


def unpack(packed: Packed) -> list[np.ndarray]:
    """The inverse of `pack`. The results are views.

    >>> [x.tolist() for x in unpack(pack([np.zeros(2), np.ones(3)]))]
    [[0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    array, lengths = packed
    return np.split(array, np.cumsum(lengths)[:-1]) if lengths else list(array)


def pack_outputs(outputs: Sequence[Any]) -> Any:
    """Outputs as one array if they are arrays of one shape and dtype. Otherwise as a list.

    >>> pack_outputs([np.zeros(2), np.ones(2)]).shape, pack_outputs([(1, 2)])
    ((2, 2), [(1, 2)])
    """
    kinds = {(x.shape, x.dtype) if isinstance(x, np.ndarray) else None for x in outputs}
    return np.stack(outputs) if len(kinds) == 1 and None not in kinds else list(outputs)
