"""The settings in a config.json of Hugging Face that change what a network computes."""

from collections.abc import Mapping
from typing import Any


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
