"""What may be in a config.json of Hugging Face: types of its numbers, and settings that change what a network computes."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
"""A number of channels, layers, tokens or pixels. A larger one is damage. It would take memory before it is compared."""
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
"""A number above 0, and not infinite."""


def unsupported(fields: Mapping[str, Any], settings: Mapping[str, tuple[Any, ...]], explained: Mapping[str, str]) -> list[str]:
    """A phrase for each setting that has another value than the supported ones.

    Args:
      fields: the content of config.json.
      settings: the supported values of each setting, the default first.
      explained: why other values of a setting are not supported.

    >>> unsupported({"hidden_act": "relu"}, {"hidden_act": ("gelu",)}, {"hidden_act": "only GELU is"})
    ["hidden_act is 'relu' instead of 'gelu': only GELU is"]
    """
    wrong = []
    for name, values in settings.items():
        found = fields.get(name, values[0])
        if found not in values:
            why = f": {explained[name]}" if name in explained else ""
            wrong.append(f"{name} is {found!r} instead of {values[-1] if values[0] is None else values[0]!r}{why}")
    return wrong
