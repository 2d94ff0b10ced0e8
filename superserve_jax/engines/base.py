"""What the server needs from a device that holds a SuperNet: the `Engine` protocol. No jax.

`fake.py` has engines without a model, for tests. `device.py` has the engine that runs a SuperNet.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.subnet import Subnet


class Engine(Protocol):
    """One device that holds one SuperNet. The server calls it from one thread at a time.

    Attributes:
      name: the name used in messages and thread names, such as "gpu:0".
      input_shape: the shape of one input, without a batch dimension. With length buckets, it is the shape of the longest
        possible input.
      input_dtype: the dtype of inputs.
      lengths: the length buckets in tokens, ascending; `()` if all inputs have `input_shape`. With length buckets, the first
        dimension of an input may have any length up to the longest.
      pad_id: the token id of padding; used with length buckets only.
      class_names: optional; names of the classes for `Reply.label`.
    """

    name: str
    input_shape: tuple[int, ...]
    input_dtype: np.dtype
    lengths: tuple[int, ...]
    pad_id: int

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """Computes one batch, and returns one output for each input when all are ready.

        Args:
          subnet: a subnet of the profile.
          batch_size: a batch size of the profile, at least `len(inputs)`. The engine pads the batch to this size, and removes
            the padding from the outputs.
          inputs: read-only arrays of `input_shape` and `input_dtype`. With length buckets, the engine pads them to the
            length bucket of the longest input (`lengths.length_bucket`).

        Outputs must not share memory with a buffer that a later call writes to. The engine checks them with `check_outputs`:
        one check per batch is cheap, while a check in the server would cost time for every query.

        Any exception counts as a failure of the batch. The server then retries the batch in smaller parts, on another worker
        if there is one. It also calls this engine once more with inputs of zeros. If this call raises too, the engine itself
        counts as failed. MemoryError and jax's RESOURCE_EXHAUSTED mean that the batch is too large for the device's memory;
        the server then makes smaller ones. After NotFiniteError, the server also tries other subnets (see `serving.blame`).
        """
        ...


class Overlapping(Engine, Protocol):
    """An engine whose device computes by itself, so that the host can stage the next batch in the meantime.

    Attributes:
      overlap: whether staging the next batch early saves time. On a CPU it does not: host and device share the cores.
    """

    overlap: bool

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> "Launched":
        """Starts the computation of `run` without waiting for it. `inputs` are not read after the return.

        At most two batches are in flight at a time. The server may abandon one. `launch` and both functions of `Launched`
        may raise.
        """
        ...


class Remote(Overlapping, Protocol):
    """An engine in another process, perhaps on another host. A call takes time, and the process may be lost.

    `launch`, and the functions of `Launched`, raise EngineLostError if the process is gone, or silent for longer than the
    batch can take, and before the server's `stall_s` is over. Then the worker leaves. Its batches are tried again.

    Attributes:
      lead_s: how long before its device is done the next batch must be handed over.
      place: what `Server.add_worker` takes to make the engine again, once the process answers. None if it never will.
    """

    lead_s: float
    place: Any


class Launched(NamedTuple):
    """A batch in flight on a device.

    Args:
      wait: blocks until the device has computed the batch.
      outputs: returns the outputs, as `Engine.run` does. It is called once, after `wait`.
      in_time: of a `Remote` engine: blocks until the batch is computed or takes suspiciously long. Returns whether it is
        computed. Called once, before `wait`.
      device_s: of a `Remote` engine: the time that the device itself took, in seconds. Called after `outputs`.
    """

    wait: Callable[[], object]
    outputs: Callable[[], Sequence[Any]]
    in_time: Callable[[], bool] | None = None
    device_s: Callable[[], float] | None = None


def times_s(profile: Profile, what: Literal["latency_ms", "p99_ms"]) -> dict[tuple[Subnet, int, int], float]:
    """What a profile says about each batch, in seconds: {(subnet, batch size, length bucket, or 0 without any): time}.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> round(times_s(profile, "latency_ms")[profile.fastest().subnet, 16, 0], 4)
    0.0074
    """
    return {
        (row.subnet, size, table.lengths[0] if table.lengths else 0): 1e-3 * ms
        for table in profile.each_length
        for row in table.rows
        for size, ms in zip(table.batch_sizes, getattr(row, what), strict=True)
    }


def check_outputs(logits: np.ndarray, count: int) -> None:
    """Raises an error for outputs that cannot be right. It takes half a microsecond for a batch of small outputs.

    Args:
      logits: an array (count, ...) of floating-point outputs, without the padding of the batch.
      count: the number of inputs.

    Raises:
      InferenceError: the number of outputs is wrong. NotFiniteError: the largest number of an output is NaN or infinite.
        Other numbers of an output may be -inf, with which a network rules out classes.

    >>> check_outputs(np.zeros((2, 10), np.float32), 2)
    >>> check_outputs(np.array([[1.0, 2.0], [np.nan, 1.0]]), 2)
    Traceback (most recent call last):
      ...
    superserve_jax.errors.NotFiniteError: outputs [1] of 2 are NaN or infinite; look at the inputs, then at the weights
    """
    if len(logits) != count:
        raise errors.InferenceError(
            f"outputs of shape {logits.shape} for {count} inputs; an engine must return one output for each input"
        )
    if not math.isfinite(np.vdot(logits, logits)):  # the sum of squares is finite only if all of them are
        bad = np.flatnonzero(~np.isfinite(logits.reshape(count, -1).max(axis=1)))
        if len(bad):  # else the sum was too large, or some numbers are -inf
            raise errors.NotFiniteError(
                f"outputs {bad.tolist()} of {count} are NaN or infinite; look at the inputs, then at the weights"
            )


def is_out_of_memory(error: BaseException, text: str) -> bool:
    """Whether an engine failed because a batch or its weights are too large for the device.

    Args:
      error: the engine's error.
      text: its `repr` or `str`.
    """
    # jax.errors.JaxRuntimeError is a RuntimeError whose text has the status code.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text)


class Wrapper:
    """An engine that passes calls on to another engine. Subclasses override `run` to add something."""

    def __init__(self, inner: Engine):
        self.name, self.input_shape, self.input_dtype = inner.name, inner.input_shape, inner.input_dtype
        self.lengths, self.pad_id = inner.lengths, inner.pad_id
        self.class_names = getattr(inner, "class_names", ())
        self._inner = inner

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `Engine.run`."""
        return self._inner.run(subnet, batch_size, inputs)
