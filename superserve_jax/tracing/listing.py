"""Short lists of names for reports."""

import re
from collections.abc import Sequence


def some(items: Sequence[object]) -> str:
    """The first items as text, and the number of the others."""
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def unnumbered(text: str) -> str:
    """A text with "*" for the numbers in paths.

    >>> unnumbered("blocks.3.fc1.kernel[1]")
    'blocks.*.fc1.kernel[1]'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)
