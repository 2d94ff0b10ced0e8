"""Engines without a model, for tests and simulated load. No jax."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from superserve_jax.engines.base import Launched, times_s
from superserve_jax.lengths import length_bucket
from superserve_jax.profile import Profile
from superserve_jax.subnet import Subnet


class FakeEngine:
    """Sleeps for the latency in the profile. The output for x is (first value of x, the subnet's row index).

    Args:
      profile: gives the latencies, the accepted subnets and the length buckets. Padding has the token id 0.
      name: see `Engine`.
      input_shape: see `Engine`.
      input_dtype: see `Engine`.
      speed: how many times faster than the profile the engine runs; with inf it does not sleep at all.
      on_run: called as `on_run(subnet, batch_size, inputs)` in the worker's thread before each batch. To imitate a broken
        device it may raise, and to imitate a stuck one it may block.

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
        self._latency_s = {batch: seconds / speed for batch, seconds in times_s(profile, "latency_ms").items()}
        self._rank = {row.subnet: rank for rank, row in enumerate(profile.rows)}
        self._on_run = on_run
        self._running = threading.Lock()

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        """See `Engine.run`. Raises AssertionError if the server breaks the contract."""
        assert self._running.acquire(blocking=False), "two threads in one engine"
        try:
            assert 0 < len(inputs) <= batch_size, f"{len(inputs)} inputs in a batch of {batch_size}"
            if self._on_run is not None:
                self._on_run(subnet, batch_size, inputs)
            if latency_s := self._expected_s(subnet, batch_size, inputs):
                time.sleep(latency_s)
            return self._outputs(subnet, inputs)
        finally:
            self._running.release()

    def _expected_s(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> float:
        return self._latency_s[subnet, batch_size, length_bucket(self.lengths, inputs) if self.lengths else 0]

    def _outputs(self, subnet: Subnet, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        rank = self._rank[subnet]
        return [(x.item(0), rank) for x in inputs]


class FakeDevice(FakeEngine):
    """A `FakeEngine` that imitates a GPU: the device computes by itself, one batch after the other.

    Meanwhile the host can copy the inputs of the next batch into a staging buffer. `on_run` is called in `Launched.wait`.
    """

    overlap = True

    def __init__(self, profile: Profile, **options: Any):
        super().__init__(profile, **options)
        self._free = [np.zeros((profile.max_batch, *self.input_shape), self.input_dtype) for _ in range(2)]
        self._free_s = 0.0  # when the device will be free, after all batches launched so far

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> list[tuple[Any, int]]:
        """See `Engine.run`."""
        launched = self.launch(subnet, batch_size, inputs)
        launched.wait()
        return list(launched.outputs())

    def launch(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Launched:
        """See `Overlapping.launch`. Raises AssertionError if the server breaks the contract."""
        assert self._free, "three batches at once"
        assert 0 < len(inputs) <= batch_size, f"{len(inputs)} inputs in a batch of {batch_size}"
        latency_s = self._expected_s(subnet, batch_size, inputs)
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
