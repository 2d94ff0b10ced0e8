"""Checks that configs and datasets share."""

import math
from typing import Any

from superserve_jax import errors


def demand_whole(name: str, value: Any, least: int) -> None:
    """Raises ConfigError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise errors.ConfigError(f"{name} must be a whole number from {least} up, got {value!r}")


def demand_number(name: str, value: Any, *, least: float = 0.0, below: float = math.inf) -> None:
    """Raises ConfigError unless `value` is a finite number from `least` up and below `below`."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value < below:
        limit = f" and below {below}" if below < math.inf else ""
        raise errors.ConfigError(f"{name} must be a finite number of at least {least:g}{limit}, got {value!r}")
