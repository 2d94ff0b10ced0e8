"""What the server asks of a device that holds a SuperNet, and an engine without a model to test it with. No jax."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling import length_queue as padding
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


class FakeEngine:
    """Sleeps for the latency in the profile; the output of an input is (its first value, rank of the subnet in accuracy).

    Args:
      profile: its latencies, the subnets that it accepts, and its length buckets, in which padding has the id 0.
      speed: how many times faster than the profile it runs; inf does not sleep at all.
      on_run: called as `on_run(subnet, batch_size, inputs)` in the worker's thread before each batch; it may raise, which
        is a failure of the device, or block, which is a stuck one.

    >>> from superserve_jax import profile, subnet
    >>> row = profile.Row(subnet.Subnet((1,)), 0.7, (1.0, 1.5))
    >>> engine = FakeEngine(profile.Profile((1, 2), (row,)), speed=float("inf"))
    >>> engine.run(row.subnet, 2, [np.float32(5)])
    [(5.0, 0)]
    """

    def __init__(
        self,
        profile: Profile,
        *,
        name: str = "fake:0",
        input_shape: tuple[int, ...] = (),
        input_dtype: Any = np.float32,
        speed: float = 1.0,
        on_run: Callable[[Subnet, int, list[np.ndarray]], object] | None = None,
    ):
        self.name, self.input_shape, self.input_dtype = name, input_shape, np.dtype(input_dtype)
        self.lengths, self.pad_id = profile.lengths, 0
        self._latency_s = {
            (row.subnet, size, table.lengths[0] if table.lengths else 0): 1e-3 * ms / speed
            for table in profile.tables
            for row in table.rows
            for size, ms in zip(table.batch_sizes, row.latency_ms, strict=True)
        }
        self._rank = {row.subnet: rank for rank, row in enumerate(profile.rows)}
        self._on_run = on_run
        self._running = threading.Lock()

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        """See `Engine.run`. Raises AssertionError where the server breaks that contract."""
        assert self._running.acquire(blocking=False), "two threads in one engine"
        try:
            assert 0 < len(inputs) <= batch_size, f"{len(inputs)} inputs in a batch of {batch_size}"
            if self._on_run is not None:
                self._on_run(subnet, batch_size, inputs)
            if latency_s := self._takes_s(subnet, batch_size, inputs):
                time.sleep(latency_s)
            return self._outputs(subnet, inputs)
        finally:
            self._running.release()

    def _takes_s(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> float:
        return self._latency_s[subnet, batch_size, padding.of_inputs(self.lengths, inputs) if self.lengths else 0]

    def _outputs(self, subnet: Subnet, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        rank = self._rank[subnet]
        return [(x.item(0), rank) for x in inputs]


class FakeDevice(FakeEngine):
    """A `FakeEngine` whose device computes on its own, one batch after the other, while the host copies the next one's inputs
    into a staging buffer, as it would for a real device. `on_run` is called when the outputs are waited for."""

    overlap = True

    def __init__(self, profile: Profile, **options: Any):
        super().__init__(profile, **options)
        self._free = [np.zeros((profile.max_batch, *self.input_shape), self.input_dtype) for _ in range(2)]
        self._free_s = 0.0  # when it is done with all that was launched

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        """See `Engine.run`."""
        launched = self.launch(subnet, batch_size, inputs)
        launched.wait()
        return list(launched.outputs())

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `Overlapping.launch`. Raises AssertionError where the server breaks that contract."""
        assert self._free, "three batches at once"
        assert 0 < len(inputs) <= batch_size, f"{len(inputs)} inputs in a batch of {batch_size}"
        latency_s = self._takes_s(subnet, batch_size, inputs)
        staged = self._free.pop()
        for i, x in enumerate(inputs):
            if self.lengths:
                staged[i, : len(x)] = x
            else:
                staged[i] = x
        self._free_s = done_s = max(time.monotonic(), self._free_s) + latency_s

        def wait() -> None:
            try:
                if self._on_run is not None:
                    self._on_run(subnet, batch_size, inputs)
            except BaseException:
                self._free.append(staged)
                raise
            if (left_s := done_s - time.monotonic()) > 0:
                time.sleep(left_s)

        def outputs() -> list[tuple[Any, int]]:
            self._free.append(staged)
            return self._outputs(subnet, list(staged[: len(inputs)]))

        return Launched(wait, outputs)
