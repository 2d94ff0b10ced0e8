"""A family's config without values that the data tells, such as the number of classes.

    TrainConfig(
        name="image_folder",
        model=template.from_data(OFAResNetConfig(...), "num_classes", "image_size", "channels", "mean", "std"),
        data=FolderConfig("~/pets", image_size=64, channels=3),
    )

`from_data` makes a dataclass with the same fields, in which these are None. Training replaces the Nones once it has opened the
data. A value that the user gives, such as `--model.mean 0.5 0.5 0.5`, stays.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from superserve_jax import errors
from superserve_jax.supernets.family import FamilyConfig

NAMES = ("num_classes", "image_size", "channels", "mean", "std", "vocab_size", "pad_id", "max_length", "token_types")
"""The fields that data can tell."""


class ModelTemplate:
    """The base of the dataclasses that `from_data` makes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    example: ClassVar[FamilyConfig]

    def __getattr__(self, name: str) -> Any:
        """Refuses what only a complete config has, such as `create`."""
        if not hasattr(type(self).example, name):
            raise AttributeError(name)
        missing = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None]
        raise errors.ConfigError(
            f"the model has no {', '.join(missing)}, because training takes them from the data; give values here, such as "
            f"--model.{missing[0].replace('_', '-')} ..."
        )

    @property
    def given(self) -> dict[str, Any]:
        """The values that do not come from the data, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def fill(self, facts: Mapping[str, Any]) -> FamilyConfig:
        """The family's config.

        Args:
          facts: values from the data. A value that is given wins. If both are missing, the example's value is taken.
        """
        values = {**facts, **self.given}
        needed = {f.name for f in dataclasses.fields(self.example)}
        if "channels" in needed and "channels" not in values and (per_channel := values.get("mean", values.get("std"))):
            values["channels"] = len(per_channel)
        filled = {name: value for name, value in values.items() if name in needed}
        for name in ("mean", "std"):
            if name in needed and name not in filled:
                filled[name] = (0.5,) * values.get("channels", len(getattr(self.example, name)))
        return dataclasses.replace(self.example, **filled)


def from_data(example: FamilyConfig, *names: str) -> Any:
    """A family's config without some of its values, which training takes from the data.

    Args:
      example: the config with all its values.
      names: the fields that the data tells, from `NAMES`.

    Raises UnknownNameError for another field.

    >>> from superserve_jax.families.ofa_resnet import OFAResNetConfig
    >>> model = from_data(OFAResNetConfig(), "num_classes")
    >>> model.num_classes, model.image_size, model.fill({"num_classes": 12}).num_classes
    (None, 224, 12)
    """
    kind = type(example)
    known = [f.name for f in dataclasses.fields(example) if f.name in NAMES]
    for name in names:
        errors.check_name(f"field of {kind.__name__} that data can tell", name, known)
    hints = typing.get_type_hints(kind)
    fields = [
        (f.name, hints[f.name] | None, None) if f.name in names else (f.name, hints[f.name], getattr(example, f.name))
        for f in dataclasses.fields(example)
    ]
    return dataclasses.make_dataclass(
        kind.__name__,
        [(name, hint, dataclasses.field(default=value)) for name, hint, value in fields],
        bases=(ModelTemplate,),
        namespace={"__doc__": kind.__doc__, "example": example},
        frozen=True,
    )()
