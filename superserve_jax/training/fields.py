"""Checks that configs and datasets share."""

import math
from typing import Any

from superserve_jax import errors

_HUGE = 1e300  # also below infinity, and not NaN


def demand_whole(name: str, value: Any, least: int) -> None:
    """Raises ConfigError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise errors.ConfigError(f"{name} must be a whole number from {least} up, got {value!r}")


def demand_number(name: str, value: Any, *, least: float = 0.0, below: float = math.inf) -> None:
    """Raises ConfigError unless `value` is a finite number from `least` up and below `below`."""
    finite = isinstance(value, int | float) and abs(value) < _HUGE
    if not finite or not least <= value < below:
        limit = f" and below {below}" if below < math.inf else ""
        raise errors.ConfigError(f"{name} must be a finite number of at least {least:g}{limit}, got {value!r}")


def demand_bool(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise errors.ConfigError(f"{name} must be True or False, got {value!r}")


def demand_path(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is text, or None."""
    if value is not None and not isinstance(value, str):
        raise errors.ConfigError(f"{name} must be a path as text, or None, got {value!r}")
