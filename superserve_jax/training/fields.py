"""Types for the fields of a config, such as `Positive`, and the check that each value fits its type.

    batch_size: Positive = 64

Every config calls `check(self)` when it is constructed, and msgspec checks the types. So a bad value is refused at once, with
the field's name.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from superserve_jax import errors

Count = Annotated[int, msgspec.Meta(ge=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]  # a batch takes memory at once
MaxLength = Annotated[int, msgspec.Meta(ge=3)]  # tokens; two of them are special
AtLeastTwo = Annotated[int, msgspec.Meta(ge=2)]
# The upper limit refuses infinity, too. NaN fails every comparison.
Finite = Annotated[float, msgspec.Meta(ge=0, lt=1e300)]
AboveZero = Annotated[float, msgspec.Meta(ge=1e-12, lt=1e300)]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]

C = TypeVar("C")


def check(config: object, prefix: str = "", *, skip: Collection[str] = ()) -> None:
    """Raises ConfigError, or UnknownNameError for a mistyped name, unless every field of a dataclass fits its type.

    Args:
      config: an instance of the dataclass.
      prefix: text before a field's name in messages, such as "optim.".
      skip: names of fields that the caller checks.
    """
    for name, kind in _kinds(type(config)).items():
        if name not in skip:
            check_value(f"{prefix}{name}", getattr(config, name), kind)


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ConfigError, or UnknownNameError for a mistyped name, unless `value` fits the type `kind`.

    >>> check_value("batch_size", 0, Positive)
    Traceback (most recent call last):
    superserve_jax.errors.ConfigError: batch_size must be int >= 1, got 0
    """
    known = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    plain = float(value) if isinstance(value, float) else value  # msgspec refuses subclasses such as np.float64
    reason = ""
    try:
        # msgspec also takes a list for a tuple and a dict for a dataclass, which a config must not hold.
        if msgspec.convert(plain, kind) == plain:
            return
    except (msgspec.ValidationError, UnicodeEncodeError) as e:  # the latter: text with half of a surrogate pair
        reason = str(e)
    if known and all(isinstance(choice, str) for choice in known):
        raise errors.unknown_name(name, value, known)
    simple = re.match(r"Expected `((?:int|float|bool|str)(?: \| null)?)`( [<>]=? \S+)?(?!.* - at )", reason)
    told = simple and simple[1].replace("null", "None") + (simple[2] or "")
    expected = " or ".join(map(str, known)) or told or _type_name(kind)
    raise errors.ConfigError(f"{name} must be {expected}, got {value!r}")


def read(config_class: type[C], values: Mapping[str, Any]) -> C:
    """Makes a config from a JSON object. A missing field gets its default.

    Raises:
      UnknownNameError: a field that the class does not have. ConfigError: a value that does not fit.
    """
    known = {f.name for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    if surplus := sorted(set(values) - known):
        raise errors.unknown_name(f"field of {config_class.__name__}", surplus[0], known)
    try:
        return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except TypeError as e:
        raise errors.ConfigError(f"{config_class.__name__}: the config does not fit: {e}") from e


@functools.cache
def _kinds(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class, include_extras=True)


def _type_name(kind: Any) -> str:
    """A type as a user would write it, such as "tuple[Phase, ...]"."""
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return kind.__name__ if isinstance(kind, type) else re.sub(r"\b(\w+\.)+(?=\w)", "", str(kind))
