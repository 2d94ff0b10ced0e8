"""Short lists of names for reports."""

import itertools
from collections.abc import Collection, Iterable, Sequence


def some(items: Sequence[object]) -> str:
    """The first items as text, and the number of the others."""
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def starred(paths: Iterable[str], every: Collection[str]) -> list[str]:
    """Paths with "*" for a number that does not matter: all paths that differ only in it are given.

    Args:
      paths: the paths.
      every: all paths of the network, the given ones among them.

    >>> network = ["blocks.0.fc[0]", "blocks.1.fc[0]", "blocks.0.fc[1]", "blocks.1.fc[1]"]
    >>> starred(network[:3], network)
    ['blocks.*.fc[0]', 'blocks.0.fc[1]']
    """
    found, known = dict.fromkeys(_parts(path) for path in paths), {_parts(path) for path in every}
    for place in reversed(range(max(map(len, found), default=0))):
        given, possible = _numbers(found, place), _numbers(known, place)
        hidden = {around for around, numbers in given.items() if len(numbers) > 1 and numbers == possible.get(around)}
        found = dict.fromkeys(_hide(parts, place) if _around(parts, place) in hidden else parts for parts in found)
        known |= {_hide(parts, place) for parts in known if _is_number(parts, place)}
    return [".".join(parts) for parts in found]


def without_shared_numbers(paths: Sequence[str]) -> list[str]:
    """Paths of one block, with "*" for its number.

    >>> without_shared_numbers(["blocks.3.fc1", "blocks.3.fc1.kernel[1]", "blocks.3.fc2.kernel[0]"])
    ['blocks.*.fc1', 'blocks.*.fc1.kernel[1]', 'blocks.*.fc2.kernel[0]']
    >>> without_shared_numbers(["layers.0", "layers.0.kernel[1]", "layers.2.kernel[0]"])
    ['layers.0', 'layers.0.kernel[1]', 'layers.2.kernel[0]']
    """
    each = [_parts(path) for path in paths]
    columns = zip(*(parts[:-1] for parts in each), strict=False)
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    return [".".join("*" if p.isdigit() and i < shared else p for i, p in enumerate(parts)) for parts in each]


_Parts = tuple[str, ...]


def _parts(path: str) -> _Parts:
    return tuple(path.split("."))


def _is_number(parts: _Parts, place: int) -> bool:
    return place < len(parts) - 1 and parts[place].isdigit()


def _around(parts: _Parts, place: int) -> tuple[_Parts, _Parts]:
    return parts[:place], parts[place + 1 :]


def _hide(parts: _Parts, place: int) -> _Parts:
    return (*parts[:place], "*", *parts[place + 1 :])


def _numbers(paths: Iterable[_Parts], place: int) -> dict[tuple[_Parts, _Parts], set[str]]:
    """The numbers at this place, by what is around them."""
    found: dict[tuple[_Parts, _Parts], set[str]] = {}
    for parts in paths:
        if _is_number(parts, place):
            found.setdefault(_around(parts, place), set()).add(parts[place])
    return found
