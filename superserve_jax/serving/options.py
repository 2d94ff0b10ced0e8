"""The options of a server, and the arguments of `submit`: names, types, defaults and checks. No jax."""

import dataclasses
import functools
import math
import numbers
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from superserve_jax import errors, foreign
from superserve_jax.engines.base import Engine
from superserve_jax.lengths import trim_padding
from superserve_jax.profile import Profile
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Policy

# Options of `Server`, not of `from_engines`.
_OF_A_MODEL = ("batch_sizes", "lengths", "devices", "slicing", "slice_bytes", "compute_dtype", "cpu_workers")
_MAX_NAME = 100  # characters of a built-in policy's name, also the most that an error message shows
_MAX_STALL_S = 1e6  # 11 days; a thread cannot wait for much longer
_MOST_TIMES = 4  # engines decode images with up to so many times the pixels of an input
_MAX_SLO_MS = 1e12  # 31 years; a thread cannot wait for much longer


class ServerOptions(TypedDict, total=False):
    """Keyword arguments of `Server` and `Server.from_engines`.

    Args:
      policy: the name of a policy, such as "slackfit" or "my_file.py:my_policy", or a policy (see `scheduling.policies`).
        Default "slackfit".
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
      stall_s: a worker is abandoned if a policy object takes longer than this for a decision. The limit for a batch is the
        same, but at least 20 times its profiled 99th percentile. Default 5.
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

    Raises UnknownNameError for an unknown name, and ConfigError for an invalid value. `slo_ms` is checked where it is used,
    and so is whether a policy fits a profile.

    >>> check_options({"max_queue": 0})
    Traceback (most recent call last):
      ...
    superserve_jax.errors.ConfigError: max_queue must be a whole number from 1 up, got 0
    """
    names = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in names:
            raise errors.unknown_name("option", name, [*names, *(other for other in _OF_A_MODEL if other != name)])
    for name, (fits, expected) in _CHECKS.items():
        if name in given and not fits(given[name]):
            raise errors.ConfigError(f"{name} must be {expected}, got {foreign.text_of(given[name])}")
    options = Options(**given)
    _check_policy(options.policy)
    return options


def _check_policy(policy: str | Policy) -> None:
    """Raises ConfigError for a policy that is neither a name nor callable. See also `policies.check_name`."""
    is_name = isinstance(policy, str) and (len(policy) <= _MAX_NAME or policies.is_custom(policy))
    if not callable(policy) and not is_name:
        got = foreign.text_of(policy)[:_MAX_NAME]
        raise errors.ConfigError(f"policy must be a name such as 'slackfit', or a policy, got {got}")
    if not callable(policy):
        policies.check_name(policy)


def make_policy(policy: str | Policy, *profiles: Profile) -> Policy:
    """See `policies.create`. Also raises ConfigError for a policy that is neither a name nor callable."""
    _check_policy(policy)
    return policies.create(policy, *profiles)


def load_policy(options: Options, profiles: Sequence[Profile]) -> tuple[Options, Callable[[Profile], Policy]]:
    """The options, and a function that makes the policy for a profile.

    A name such as "my_file.py:my_policy" becomes a policy object, so that the server never runs a user's code under its lock.
    """
    if policies.is_custom(options.policy):
        options = dataclasses.replace(options, policy=make_policy(options.policy, *profiles))
    return options, functools.partial(make_policy, options.policy)


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape, dtype and lengths of the inputs of an engine (see `engines.base.Engine`), and whether it decodes image files.

    `check` reads the fields for each query. Slots are faster to read than the fields of a named tuple.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    lengths: tuple[int, ...]
    pad_id: int
    decodes: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def of(cls, engine: Engine) -> "InputSpec":
        """The inputs that `engine` takes."""
        sizes = tuple(engine.input_shape), np.dtype(engine.input_dtype), tuple(engine.lengths)
        return cls(*sizes, engine.pad_id, getattr(engine, "decodes", False))

    @property
    def is_image(self) -> bool:
        """Whether inputs are square images of pixels, grey or RGB."""
        return len(self.shape) == 3 and self.shape[0] == self.shape[1] and self.shape[2] in (1, 3) and self.dtype == np.uint8

    @property
    def nbytes(self) -> int:
        """Size of one input of the longest length."""
        return math.prod((*self.lengths[-1:], *self.shape[bool(self.lengths) :])) * self.dtype.itemsize

    def check_engine(self, engine: Engine) -> None:
        """Raises ConfigError unless an engine takes these inputs."""
        if (spec := self.of(engine)) != self:
            raise errors.ConfigError(f"{engine.name} takes {spec}, the workers of this server take {self}; they must agree")
        if self.decodes and not spec.decodes:
            raise errors.ConfigError(f"{engine.name} cannot decode image files, which this server passes on to its workers")

    def check(self, x: Any) -> np.ndarray:
        """Returns `x` as an array, without padding at its end. Raises InputError for another shape or dtype.

        Inputs are never cast: a cast of pixels between 0..255 and 0..1 would give wrong answers without an error. The bytes of
        a PNG or JPEG file are decoded here, or by the engine: then the array holds the bytes.
        """
        if type(x) is bytes and self.is_image:
            from superserve_jax import image_files  # here, since it imports Pillow

            # A larger file would take more room in the queue than its pixels, or delay the other queries of its batch.
            if self.decodes and len(x) <= self.nbytes and image_files.pixels(x) <= _MOST_TIMES * math.prod(self.shape[:2]):
                return np.frombuffer(x, np.uint8)
            return image_files.from_file(x, self.shape)
        array = x if type(x) is np.ndarray else as_array(x)
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
                f"one input without a batch dimension. {self._remedy(x)}"
            )
        return array

    def _remedy(self, x: Any) -> str:
        """What to do about a wrong input. For a model of images, a string or a path is probably the name of a file."""
        is_name = issubclass(type(x), str) or hasattr(type(x), "__fspath__")
        if not is_name or len(self.shape) != 3 or self.dtype != np.uint8:
            if is_name and self.lengths:
                return "A text becomes token ids with server.model.encode(text), if the export has a vocabulary"
            return "Inputs are never cast: convert it first"
        height, _, channels = self.shape
        return (
            f"Read the file of an image with superserve_jax.training.data.read_image(path, image_size={height}, "
            f"channels={channels}), and submit the array. Or submit the bytes of a PNG or JPEG file"
        )


def as_array(x: Any) -> np.ndarray:
    """An input as an array. Raises InputError for a masked array, and for what cannot be made one array."""
    if isinstance(x, np.ma.MaskedArray):  # NumPy would take the numbers under the mask
        raise errors.InputError("an input is a masked array, and the server has no masks; fill it before: x.filled(0)")
    try:
        return np.asarray(x)
    except Exception as e:  # any exception: the class of x may convert itself
        raise errors.InputError(
            f"an input is one array, and {type(x).__name__} cannot be made one ({foreign.text_of(e)})"
        ) from e


def check_slo(slo_ms: float) -> float:
    """Returns `slo_ms` as a float. Raises DeadlineError unless it is a positive number below 1e12."""
    try:
        if 0 < slo_ms < _MAX_SLO_MS:
            return float(slo_ms)
    except Exception:  # any exception: the class of the value may compare itself, such as Decimal("NaN")
        pass
    raise errors.DeadlineError(
        f"slo_ms must be a positive, finite number of milliseconds, got {foreign.text_of(slo_ms)}; 36 is the default"
    )


def check_floor(min_accuracy: float, best: float = math.inf) -> float:
    """Returns `min_accuracy`, at least 0. Raises AccuracyFloorError unless it is a number, and at most `best`.

    Args:
      min_accuracy: the lowest accuracy that a client accepts.
      best: the accuracy of the best served subnet. Infinity if it is not known here.
    """
    try:
        if min_accuracy <= best:
            return float(min_accuracy) if min_accuracy > 0 else 0.0  # float() overflows for a huge negative integer
    except Exception:  # as in `check_slo`
        pass
    got = foreign.text_of(min_accuracy)
    if best == math.inf:
        raise errors.AccuracyFloorError(f"min_accuracy must be a fraction of 1, got {got}; 0 admits all subnets")
    raise errors.AccuracyFloorError(
        f"min_accuracy={got}, a fraction of 1, but the best served subnet has {best}; ask for no more"
    )
