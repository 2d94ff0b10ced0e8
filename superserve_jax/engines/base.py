"""What the server asks of a device that holds a SuperNet, and an engine without a model to test it with. No jax."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet


class Engine(Protocol):
    """One device that holds one SuperNet. The server calls it from one thread at a time.

    Attributes:
      name: for messages and thread names, such as "gpu:0".
      input_shape: shape of one input, without a batch dimension; with length buckets, of one that fills the longest.
      input_dtype: its dtype.
      lengths: length buckets in tokens, ascending; `()` where all inputs have `input_shape`. The first dimension of an input
        may then have any length up to the longest.
      pad_id: with length buckets, the token id of padding.
    """

    name: str
    input_shape: tuple[int, ...]
    input_dtype: np.dtype
    lengths: tuple[int, ...]
    pad_id: int

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """Computes one batch and returns when the outputs are ready, one for each input.

        Args:
          subnet: one of the profile's.
          batch_size: one of the profile's, at least `len(inputs)`; the engine pads up to it and strips the padding.
          inputs: arrays of `input_shape` and `input_dtype`, read only. With length buckets the engine runs the program of the
            one that holds the longest (`padding.of_inputs`).

        No output may share memory with a buffer that a later call writes to. An output is a valid one: the server cannot
        look at each without costing every query time, so the engine looks at all of a batch at once (`check_outputs`).
        Whatever it raises is a failure of the batch, which is tried again in parts, elsewhere if there is another worker. The
        engine is then called once more with inputs of zeros, and where it raises again, the failure is its own. An error that
        says the batch needs more memory than there is, MemoryError or jax's RESOURCE_EXHAUSTED, makes its batches smaller.
        """
        ...


class Overlapping(Engine, Protocol):
    """An engine whose device computes on its own, so that the host can stage the next batch meanwhile.

    Attributes:
      overlap: whether that gains anything: on a CPU the host's work takes from the device's.
    """

    overlap: bool

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> "Launched":
        """Begins what `run` does. `inputs` are not read any more once it has returned.

        Up to two batches are under way at a time; one may be given up. All three calls may raise.
        """
        ...


class Launched(NamedTuple):
    """A batch that a device has been handed.

    Args:
      wait: returns when the device is done with it, at once if it is done already.
      outputs: returns what `Engine.run` does; called once, after `wait`.
    """

    wait: Callable[[], object]
    outputs: Callable[[], Sequence[Any]]


def check_outputs(logits: np.ndarray, count: int) -> None:
    """Refuses what cannot be the outputs of `count` inputs; half a microsecond for a batch of small ones.

    Args:
      logits: (count, ...), floating point, padding stripped: what a padded row holds is of no query.

    Raises InferenceError for another number of outputs, and for a NaN among them. Infinities pass.

    >>> check_outputs(np.zeros((2, 10), np.float32), 2)
    >>> check_outputs(np.array([[1.0, 2.0], [np.nan, 1.0]]), 2)
    Traceback (most recent call last):
      ...
    superserve_jax.errors.InferenceError: outputs [1] of 2 have NaN in them; look at the inputs, then at the weights
    """
    if len(logits) != count:
        raise errors.InferenceError(f"outputs of shape {logits.shape} for {count} inputs; an engine returns one for each")
    # A sum of squares is NaN only where one of them is: infinities have one sign.
    if math.isnan(np.vdot(logits, logits)):
        bad = np.flatnonzero(np.isnan(logits.reshape(count, -1)).any(axis=1))
        raise errors.InferenceError(
            f"outputs {bad.tolist()} of {count} have NaN in them; look at the inputs, then at the weights"
        )


class Wrapper:
    """An engine in front of another one, for the same inputs; a subclass does something of its own around `run`."""

    def __init__(self, inner: Engine):
        self.name, self.input_shape, self.input_dtype = inner.name, inner.input_shape, inner.input_dtype
        self.lengths, self.pad_id = inner.lengths, inner.pad_id
        self._inner = inner

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `Engine.run`."""
        return self._inner.run(subnet, batch_size, inputs)
