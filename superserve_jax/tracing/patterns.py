"""The patterns by which a user names axes and stages of blocks."""

import re


def match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What each "*" of a pattern stands for in a name. None if the pattern does not name it.

    A "*" stands for any text, also for several parts of a path. All other characters stand for themselves.

    >>> match("blocks.*.fc1", "blocks.3.fc1"), match("*.fc1", "blocks.3.fc1"), match("blocks.?.fc1", "blocks.3.fc1")
    (('3',), ('blocks.3',), None)
    """
    found = re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name, re.DOTALL)
    return found.groups() if found else None
