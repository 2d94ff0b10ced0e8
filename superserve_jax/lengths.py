"""Length buckets: the few lengths that a text server pads its inputs to. No jax."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from superserve_jax import errors

_MOST = 1 << 20  # of a batch size or a length; tables have an entry for every number up to it
_SHORTEST = 16  # the shortest default length bucket; shorter inputs hardly run faster


def default_lengths(max_length: int) -> tuple[int, ...]:
    """The default length buckets: powers of two from 16 up that are below `max_length`, then `max_length` itself.

    >>> default_lengths(128), default_lengths(100), default_lengths(6)
    ((16, 32, 64, 128), (16, 32, 64, 100), (6,))
    """
    powers = itertools.takewhile(lambda length: length < max_length, (_SHORTEST << i for i in itertools.count()))
    return (*powers, max_length)


def trim_padding(x: np.ndarray, pad_id: int) -> np.ndarray:
    """Remove the trailing padding of one sequence. At least one position is kept.

    Args:
      x: token ids (T,), or ids and token types (T, 2).
      pad_id: the id of the padding token.

    >>> trim_padding(np.array([5, 0, 7, 0, 0]), 0).tolist(), trim_padding(np.zeros((4, 2), int), 0).shape
    ([5, 0, 7], (1, 2))
    """
    kept = np.flatnonzero((x if x.ndim == 1 else x[:, 0]) != pad_id)
    return x[: kept[-1] + 1 if len(kept) else 1]


def length_bucket(lengths: Sequence[int], inputs: Sequence[np.ndarray]) -> int:
    """The smallest length bucket that holds all inputs. Raises InputError if an input is longer than every length bucket."""
    longest = max(map(len, inputs))
    if longest > lengths[-1]:
        raise errors.InputError(f"an input of {longest} tokens, but the longest length bucket has {lengths[-1]}; truncate it")
    return lengths[bisect.bisect_left(lengths, longest)]


def check_length_buckets(lengths: Sequence[int]) -> tuple[int, ...]:
    """Length buckets as a tuple. Raises ConfigError unless they are ascending whole numbers from 1 to 2^20."""
    return check_ascending("lengths", lengths, "(32, 64, 128)")


def check_ascending(name: str, values: Sequence[int], example: str) -> tuple[int, ...]:
    """`values` as a tuple. Raises ConfigError unless they are ascending whole numbers from 1 to 2^20."""
    found = tuple(values) if isinstance(values, Iterable) else ()
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= _MOST for v in found)
    if not (found and whole and list(found) == sorted(set(found))):
        raise errors.ConfigError(
            f"{name} must be ascending whole numbers from 1 to {_MOST:,}, such as {example}, got {values!r}"
        )
    return found
