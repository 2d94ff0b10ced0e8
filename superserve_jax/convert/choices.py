"""The choices of an axis of a converted network: those that the user gives, or default ones."""

from collections.abc import Sequence

from superserve_jax import errors


def checked(name: str, given: Sequence[int] | None, offered: Sequence[int]) -> tuple[int, ...]:
    """The choices of an axis: `given`, or `offered` if `given` is None. The largest must be the size of the weights."""
    found = tuple(sorted(set(offered if given is None else given)))
    if not found or found[-1] != offered[-1]:
        raise errors.ConfigError(f"the largest of {name} must be the size of the weights, {offered[-1]}; got {list(found)}")
    return found


def quarters(count: int) -> list[int]:
    """A quarter, a half, three quarters and all of `count`, as whole numbers from 1 up.

    >>> quarters(12), quarters(2)
    ([3, 6, 9, 12], [1, 2])
    """
    return sorted({max(1, count * k // 4) for k in (1, 2, 3, 4)})


def upper_half(count: int) -> range:
    """The whole numbers from half of `count` to `count`.

    >>> list(upper_half(5))
    [3, 4, 5]
    """
    return range((count + 1) // 2, count + 1)
