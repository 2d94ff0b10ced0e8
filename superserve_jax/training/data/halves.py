"""Divides the test split: one half gives the profiled accuracies, the other half is what a replay sends. No jax.

The policy knows the profiled accuracies. So the accuracy that a replay measures must come from other examples.
"""

import numpy as np

from superserve_jax import errors

_BLOCKS = 8  # of each class; neighbours in a split often show the same object, and a block keeps them in one half


def profiling_half(labels: np.ndarray) -> np.ndarray:
    """Whether each example of a test split belongs to the profiling half. The others belong to the replay half.

    The examples of each class, in their order, are cut into 8 blocks. Blocks 1, 4, 5 and 8 go to one half, the others to the
    other half. So both halves have the same share of every class, also if the split is sorted by class.

    Args:
      labels: the label of every example, integers (N,).

    Returns:
      A mask (N,).

    Raises DataError if there are fewer than two examples.

    >>> profiling_half(np.array([0, 0, 0, 0, 1, 1, 1])).tolist()
    [True, False, False, True, False, True, True]
    """
    if len(labels) < 2:
        raise errors.DataError(
            f"the test split has {len(labels)} examples; give at least 2: one half is profiled, the other one replayed"
        )
    half = np.zeros(len(labels), bool)
    for place, label in enumerate(np.unique(labels)):
        (members,) = np.nonzero(labels == label)
        block = np.arange(len(members)) * min(_BLOCKS, len(members)) // len(members)
        half[members] = ((block + 1) // 2 + place) % 2 == 0  # every second class begins with the other half
    return half
