"""The options of a server, with their defaults, checked. No jax."""

import dataclasses
import numbers
import time
from collections.abc import Callable
from typing import TypedDict

from superserve_jax import errors

_MAX_STALL_S = 1e6  # 11 days; a thread cannot wait for much longer


class Tuning(TypedDict, total=False):
    """Options of `server.Server` that seldom need a change.

    Args:
      max_queue_bytes: bytes of inputs that may wait, next to `max_queue`, a text's as padded to its length bucket.
        Default 1 GiB.
      admission: whether queries that cannot be met any more are refused with AdmissionError at arrival (see `admission`).
        Default False.
      max_tries: how many batches with a query have to fail at least, the last of it alone, before it is answered with the
        error. Default 3.
      max_failures: batches in a row that fail, and fail with blank inputs, too, after which a worker leaves. Default 5.
      stall_s: a worker whose batch takes longer, and 20 times longer than its profiled 99th percentile, is taken for stuck
        and abandoned. Default 5.
      overlap: whether a worker takes and stages its next batch shortly before the device is done with the last, and answers
        that while the device computes (see `engine.Overlapping`). Default None: where the device is no CPU, whose cores the
        host needs itself. Where memory does not suffice for two batches at once, a worker goes on with one at a time.
      tune_runtime: whether `runtime.low_latency` is entered while the server is open. Default True.
      follow_drift: whether what a worker is slower than its profile of late is made up for (see `drift`). Default True.
      telemetry: whether batches are counted for `Server.snapshot`, which costs a query a third of a microsecond of CPU time.
        Default True.
      clock: monotonic seconds. Default `time.monotonic`.
    """

    max_queue_bytes: int
    admission: bool
    max_tries: int
    max_failures: int
    stall_s: float
    overlap: bool | None
    tune_runtime: bool
    follow_drift: bool
    telemetry: bool
    clock: Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a server is told about its queue and its workers: `Tuning`, and `max_queue` and `expire` of `server.Server`.

    Raises ConfigError for values that cannot be.

    >>> Options(max_queue=0)
    Traceback (most recent call last):
      ...
    superserve_jax.errors.ConfigError: max_queue must be a whole number from 1 up, got 0
    """

    max_queue: int = 10_000
    expire: bool = False
    max_queue_bytes: int = 1 << 30
    admission: bool = False
    max_tries: int = 3
    max_failures: int = 5
    stall_s: float = 5.0
    overlap: bool | None = None
    tune_runtime: bool = True
    follow_drift: bool = True
    telemetry: bool = True
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        for name in "max_queue", "max_queue_bytes", "max_tries", "max_failures":
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise errors.ConfigError(f"{name} must be a whole number from 1 up, got {value!r}")
        for name in "expire", "admission", "tune_runtime", "follow_drift", "telemetry":
            if not isinstance(getattr(self, name), bool):
                raise errors.ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.stall_s, numbers.Real) or not 0 < self.stall_s <= _MAX_STALL_S:
            raise errors.ConfigError(
                f"stall_s must be a positive number of seconds up to {_MAX_STALL_S:g}, got {self.stall_s!r}"
            )
        if self.overlap is not None and not isinstance(self.overlap, bool):
            raise errors.ConfigError(
                f"overlap must be True, False or None for where the device allows it, got {self.overlap!r}"
            )
        if not callable(self.clock):
            raise errors.ConfigError(f"clock must be a function without arguments, such as time.monotonic, got {self.clock!r}")
