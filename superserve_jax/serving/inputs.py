"""Checks of the arguments of `submit`: the input, the latency objective and the accuracy floor. No jax."""

import dataclasses
import math
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.lengths import trim_padding

_MAX_SLO_MS = 1e12  # 31 years; a thread cannot wait for much longer


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape, dtype and lengths of the inputs of an engine (see `engines.base.Engine`).

    `check` reads the fields for each query. Slots are faster to read than the fields of a named tuple.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    lengths: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, engine: Engine) -> "InputSpec":
        """The inputs that `engine` takes."""
        return cls(tuple(engine.input_shape), np.dtype(engine.input_dtype), tuple(engine.lengths), engine.pad_id)

    @property
    def nbytes(self) -> int:
        """Size of one input of the longest length."""
        return math.prod((*self.lengths[-1:], *self.shape[bool(self.lengths) :])) * self.dtype.itemsize

    def check(self, x: Any) -> np.ndarray:
        """Returns `x` as an array, without padding at its end. Raises InputError for another shape or dtype.

        Inputs are never cast: a cast of pixels between 0..255 and 0..1 would give wrong answers without an error.
        """
        array = x if type(x) is np.ndarray else _as_array(x)
        if self.lengths and array.ndim and array.shape[1:] == self.shape[1:] and array.dtype == self.dtype:
            array = trim_padding(array, self.pad_id)
            if not 0 < len(array) <= self.lengths[-1]:
                raise errors.InputError(
                    f"an input of {len(array)} tokens, padding at the end not counted; expected 1 to {self.lengths[-1]}: "
                    "cut it, or open the server with a greater length"
                )
            return array
        if array.shape != self.shape or array.dtype != self.dtype:
            raise errors.InputError(
                f"an input of shape {array.shape} and dtype {array.dtype}; expected {self.shape} and {self.dtype}, "
                "one input without a batch dimension. Inputs are never cast: convert it as the model's export describes"
            )
        return array


def _as_array(x: Any) -> np.ndarray:
    with errors.refusing(errors.InputError, "an input is one array, and this cannot be made one"):
        return np.asarray(x)


def check_slo(slo_ms: float) -> float:
    """Returns `slo_ms` as a float. Raises DeadlineError unless it is a positive number below 1e12."""
    try:
        if 0 < slo_ms < _MAX_SLO_MS:
            return float(slo_ms)
    except (TypeError, ValueError):
        pass
    raise errors.DeadlineError(f"slo_ms must be a positive, finite number of milliseconds, got {slo_ms!r}; 36 is the default")


def check_floor(min_accuracy: float, best: float) -> float:
    """Returns `min_accuracy`, at least 0. Raises AccuracyFloorError unless it is at most `best`."""
    try:
        if min_accuracy <= best:
            return float(max(min_accuracy, 0.0))  # `max` first: float() overflows for a huge negative integer
    except (TypeError, ValueError):
        pass
    raise errors.AccuracyFloorError(
        f"min_accuracy={min_accuracy!r}, a fraction of 1, but the best served subnet has {best}; ask for no more"
    )
