"""The families of SuperNets, by name. `ofa_resnet.py` and `dynabert.py` are the built-in ones.

To add a family:

1. Write a frozen dataclass with the members of `supernets.FamilyConfig`, and a network of elastic layers (`layers.py`).
2. Put the file into this folder: every file here is imported. If the file is elsewhere, decorate the dataclass with
   `families.register`, and import the file before you load its runs or exports.
3. Verify the family: `supernets.check(config)`.

`ofa_resnet.py` is the example to follow. tests/helpers/mlp_family.py is a small example.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig

_FAMILIES: dict[str, type] = {}


def register(config_class: type) -> type:
    """A class decorator that registers a family under its name, so that its runs and exports can be read."""
    _FAMILIES[config_class.family] = config_class
    return config_class


def config_to_json(config: FamilyConfig) -> dict[str, Any]:
    """A family's config as a dict for `json.dump`."""
    return {"family": config.family, **{f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}}


@errors.refusing(errors.ConfigError, "not the config of a family as config_to_json writes it")
def config_from_json(data: Mapping[str, Any]) -> FamilyConfig:
    """The inverse of `config_to_json`.

    Raises:
      UnknownNameError: the family or a field is unknown.
      ConfigError: the values of the fields do not fit.
    """
    name = data.get("family")
    if name not in _FAMILIES:
        # A file never says which code to import. So a family is known only if its module was imported.
        unknown = errors.unknown_name("family", name, _FAMILIES)
        raise errors.UnknownNameError(f"{unknown}; import the module that registers it first (families.register)")
    fields = {k: _from_plain(v) for k, v in data.items() if k != "family"}
    known = {f.name for f in dataclasses.fields(_FAMILIES[name])}
    for field in fields:
        errors.check_name(f"field of {name}'s config", field, known)
    with errors.refusing(errors.ConfigError, f"the config of family '{name}' does not fit"):
        return _FAMILIES[name](**fields)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Subnet):
        return value.to_json()
    return config_to_json(value) if isinstance(value, FamilyConfig) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return config_from_json(value) if "family" in value else Subnet.from_json(value)
    return tuple(_from_plain(v) for v in value) if isinstance(value, list) else value


def _register_files() -> None:
    """Registers the family of every file in this folder."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__ and isinstance(vars(value).get("family"), str):
                register(value)


_register_files()
