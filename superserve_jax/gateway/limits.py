"""What a gateway allows its clients: sizes, times and numbers."""

import dataclasses
import math
import threading
from typing import Any

from superserve_jax import errors

MOST_BODY_BYTES = 64 << 20
"""The largest default of `Limits.max_body_bytes`."""
REQUEST_BYTES = 1024
"""Memory of a request besides its body."""
_LEAST_BODY_BYTES = 1 << 20
_ROWS, _JSON_BYTES = 1024, 4  # the default body holds so many inputs as JSON, with so many characters for each byte


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a gateway. Each protects the server's other clients from a slow or greedy one.

    Args:
      max_body_bytes: the longest body of an inference, as it is sent and inflated; longer ones get status 413. None takes the
        size of 1,024 inputs as JSON, between 1 and 64 MiB. Other requests have at most 4 KiB.
      max_buffered_bytes: how many bytes of requests with bodies may be in memory at once, over HTTP and gRPC together; one
        more gets status 503.
      max_head_bytes: the longest head of a request, which is its first line and its headers; longer ones get status 431.
      max_connections: how many connections may be open; one more gets status 503. With TLS, as many more may be in their
        handshake; one more is closed.
      head_s: seconds from the first byte of a request to the end of its head; then it gets status 408. A new connection
        without a byte is closed after as long.
      body_s: seconds from the first byte of a request to its last one; then it gets status 408.
      idle_s: seconds after which a connection without a request is closed, when it has had one.
      write_s: seconds after which a connection is closed if its client does not read the answers.
      lame_duck_s: seconds in which a closing gateway still takes new connections, and says that it is not ready.
      drain_s: seconds that a closing gateway then waits for requests without an answer.

    See `check_limits`.
    """

    max_body_bytes: int | None = None
    max_buffered_bytes: int = 256 << 20
    max_head_bytes: int = 64 << 10
    max_connections: int = 1_000
    head_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0  # clients of the protocol keep a connection for a minute
    write_s: float = 60.0
    lame_duck_s: float = 0.0
    drain_s: float = 10.0


def check_limits(limits: Any) -> Limits:
    """Returns limits. Raises ConfigError unless they are right.

    >>> check_limits(Limits(drain_s=-1))
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: drain_s must be a number of seconds from 0 up, got -1
    """
    if not isinstance(limits, Limits):
        raise errors.ConfigError(f"limits must be gateway.Limits, got {type(limits).__name__}")
    for field in dataclasses.fields(limits):
        name, value = field.name, getattr(limits, field.name)
        if name == "max_body_bytes" and value is None:
            continue
        if name.endswith("_s"):
            least = 0.0 if name in ("drain_s", "lame_duck_s") else math.ulp(0.0)
            if not _is_number(value, (int, float)) or not least <= value < threading.TIMEOUT_MAX:
                what = "a number of seconds from 0 up" if not least else "a positive number of seconds"
                raise errors.ConfigError(f"{name} must be {what}, got {value!r}")
        elif not _is_number(value, (int,)) or value < 1:
            raise errors.ConfigError(f"{name} must be a whole number from 1 up, got {value!r}")

    if limits.max_body_bytes is not None and limits.max_buffered_bytes < limits.max_body_bytes + REQUEST_BYTES:
        raise errors.ConfigError(
            f"max_buffered_bytes={limits.max_buffered_bytes} has no room for max_body_bytes={limits.max_body_bytes}; raise it"
        )
    return limits


def body_limit(limits: Limits, input_bytes: int) -> int:
    """The longest body of a request, for inputs of so many bytes.

    >>> body_limit(Limits(), 1024), body_limit(Limits(), 10), body_limit(Limits(max_body_bytes=7), 10)
    (4259840, 1048576, 7)
    """
    if limits.max_body_bytes is not None:
        return limits.max_body_bytes
    usual = max(_ROWS * input_bytes * _JSON_BYTES + (64 << 10), _LEAST_BODY_BYTES)
    return min(usual, MOST_BODY_BYTES, max(limits.max_buffered_bytes - REQUEST_BYTES, 1))


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
