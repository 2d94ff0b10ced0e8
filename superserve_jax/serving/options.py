"""The options of a server: names, types, defaults and checks. No jax."""

import numbers
import time
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypedDict

from superserve_jax import errors
from superserve_jax.scheduling.policies import Policy

_MAX_STALL_S = 1e6  # 11 days; a thread cannot wait for much longer


class _Option(NamedTuple):
    """An option's default, its check, and the expected value in words."""

    default: Any
    fits: Callable[[Any], bool] = lambda value: True
    expected: str = ""


def _whole(default: int) -> _Option:
    return _Option(default, lambda value: isinstance(value, numbers.Integral) and int(value) >= 1, "a whole number from 1 up")


def _flag(default: bool) -> _Option:
    return _Option(default, lambda value: isinstance(value, bool), "True or False")


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

    policy: Annotated[str | Policy, _Option("slackfit")]
    slo_ms: Annotated[float, _Option(36.0)]
    max_queue: Annotated[int, _whole(10_000)]
    expire: Annotated[bool, _flag(False)]
    max_queue_bytes: Annotated[int, _whole(1 << 30)]
    admission: Annotated[bool, _flag(False)]
    max_tries: Annotated[int, _whole(3)]
    max_failures: Annotated[int, _whole(5)]
    stall_s: Annotated[
        float,
        _Option(
            5.0,
            lambda value: isinstance(value, int | float) and 0 < value <= _MAX_STALL_S,
            f"a positive number of seconds up to {_MAX_STALL_S:g}",
        ),
    ]
    overlap: Annotated[
        bool | None,
        _Option(None, lambda value: value is None or isinstance(value, bool), "True, False or None (as the device allows)"),
    ]
    tune_runtime: Annotated[bool, _flag(True)]
    follow_drift: Annotated[bool, _flag(True)]
    clock: Annotated[
        Callable[[], float], _Option(time.monotonic, callable, "a function without arguments, such as time.monotonic")
    ]


_DECLARED: dict[str, _Option] = {
    name: hint.__metadata__[0] for name, hint in typing.get_type_hints(ServerOptions, include_extras=True).items()
}

Options = types.SimpleNamespace
"""The checked options of a server: one attribute for each entry of `ServerOptions`."""


def check_options(given: ServerOptions) -> Options:
    """Checks the given options, and adds the defaults of the others.

    Raises UnknownNameError for an unknown name, and ConfigError for an invalid value. `policy` and `slo_ms` are checked where
    they are used.

    >>> check_options({"max_queue": 0})
    Traceback (most recent call last):
      ...
    superserve_jax.errors.ConfigError: max_queue must be a whole number from 1 up, got 0
    """
    for name, value in given.items():
        if name not in _DECLARED:
            raise errors.unknown_name("option", name, _DECLARED)
        if not _DECLARED[name].fits(value):
            raise errors.ConfigError(f"{name} must be {_DECLARED[name].expected}, got {value!r}")
    return Options(**{name: option.default for name, option in _DECLARED.items()} | given)
