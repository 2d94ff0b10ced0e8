"""The options of a server: names, types, defaults and checks. No jax."""

import dataclasses
import numbers
import time
from collections.abc import Callable
from typing import Any, TypedDict

from superserve_jax import errors
from superserve_jax.scheduling.policies import Policy

_MAX_STALL_S = 1e6  # 11 days; a thread cannot wait for much longer


class ServerOptions(TypedDict, total=False):
    """Keyword arguments of `Server` and `Server.from_engines`.

    Args:
      policy: the name of a policy, such as "slackfit", or a policy (see `scheduling.policies`). Default "slackfit".
      slo_ms: the latency objective of queries that are submitted without one. Default 36.
      max_queue: how many queries may wait. More are refused with QueueFullError. Default 10,000.
      expire: whether a query that can no longer meet its deadline is dropped with DeadlineExpiredError. Otherwise it is
        answered late. Default False.
      max_queue_bytes: how many bytes of inputs may wait. A text counts as padded to its length bucket. Default 1 GiB.
      admission: whether a query whose deadline cannot be met is refused with AdmissionError at arrival (see
        `scheduling.admission`). Default False.
      max_tries: how many batches with a query must fail before the query gets the error. In the last one it is alone (see
        `retries` for the details). Default 3.
      max_failures: a worker leaves after so many failed batches in a row, if it also fails on blank inputs. Default 5.
      stall_s: a worker is stuck, and is abandoned, when its batch takes longer than this and longer than 20 times the
        profiled 99th percentile. Default 5.
      overlap: whether a worker prepares its next batch while the device computes the last one (see
        `engines.base.Overlapping`). Default None: on every device except a CPU, where host and device share the cores. A
        worker that runs out of memory with two batches runs one at a time from then on.
      tune_runtime: whether `runtime.low_latency` is active while the server is open. Default True.
      follow_drift: whether decisions use the measured speed of a worker, which may be slower than its profile (see
        `scheduling.speeds`). Default True.
      clock: a function that returns monotonic seconds. The server also calls it under its lock. Default `time.monotonic`.
    """

    policy: str | Policy
    slo_ms: float
    max_queue: int
    expire: bool
    max_queue_bytes: int
    admission: bool
    max_tries: int
    max_failures: int
    stall_s: float
    overlap: bool | None
    tune_runtime: bool
    follow_drift: bool
    clock: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked options of a server. It repeats `ServerOptions`, because a TypedDict cannot have defaults."""

    policy: str | Policy = "slackfit"
    slo_ms: float = 36.0
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
    clock: Callable[[], float] = time.monotonic


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and int(value) >= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


# For each option that is checked here: the check, and the expected value in words.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_queue", "max_queue_bytes", "max_tries", "max_failures"), (_is_count, "a whole number from 1 up")),
    **dict.fromkeys(("expire", "admission", "tune_runtime", "follow_drift"), (_is_flag, "True or False")),
    "stall_s": (
        lambda value: isinstance(value, int | float) and 0 < value <= _MAX_STALL_S,
        f"a positive number of seconds up to {_MAX_STALL_S:g}",
    ),
    "overlap": (lambda value: value is None or _is_flag(value), "True, False or None (as the device allows)"),
    "clock": (callable, "a function without arguments, such as time.monotonic"),
}


def check_options(given: ServerOptions) -> Options:
    """Checks the given options, and adds the defaults of the others.

    Raises UnknownNameError for an unknown name, and ConfigError for an invalid value. `policy` and `slo_ms` are checked where
    they are used.

    >>> check_options({"max_queue": 0})
    Traceback (most recent call last):
      ...
    superserve_jax.errors.ConfigError: max_queue must be a whole number from 1 up, got 0
    """
    names = [field.name for field in dataclasses.fields(Options)]
    for name, value in given.items():
        if name not in names:
            raise errors.unknown_name("option", name, names)
        fits, expected = _CHECKS.get(name, (lambda _: True, ""))
        if not fits(value):
            raise errors.ConfigError(f"{name} must be {expected}, got {value!r}")
    return Options(**given)
