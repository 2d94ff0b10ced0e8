"""The registry of families. A file holds the name of a family, and the registry knows the class of its config.

Files never name code to run. A family is known if its class was given to `register`, which the library does for the files in
`families/`. An installed package can also name its families as entry points:

    [project.entry-points."superserve_jax.families"]
    my_family = "my_package.my_module:MyConfig"

Such a module is imported when a file names the family. So are the modules in the environment variable SUPERSERVE_IMPORT,
which the option `--import` of all programs sets for the processes that they start.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

from superserve_jax import errors, foreign
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig, TracedConfig

ENTRY_POINTS = "superserve_jax.families"
"""The group of the entry points that name families."""

_DIGEST = "digest"

_BUILT_IN = "superserve_jax.families."

_FAMILIES: dict[str, type] = {}


def register(config_class: type) -> type:
    """A class decorator that registers a family under its name, so that its runs and exports can be read.

    Raises ConfigError for a class without a name, or with the name of a built-in family that it does not derive from.
    """
    name = getattr(config_class, "family", None)
    if not isinstance(name, str) or not name:
        raise errors.ConfigError(
            f"{config_class!r} has no name: give the class a line such as `family: ClassVar[str] = 'my_family'`"
        )
    old = _FAMILIES.get(name)
    if old is not None and is_built_in(old) and not issubclass(config_class, old) and not is_built_in(config_class):
        raise errors.ConfigError(f"family '{name}' is built in; give {config_class.__qualname__} another name in `family`")
    _FAMILIES[name] = config_class
    return config_class


def registered(name: str) -> type | None:
    """The class of the family with this name. None if no family has it."""
    return _FAMILIES.get(name)


def is_registered(config: FamilyConfig) -> bool:
    """Whether the name of a config's family is known."""
    return config.family in _FAMILIES


def is_built_in(config_class: type) -> bool:
    """Whether a family belongs to this library."""
    return config_class.__module__.startswith(_BUILT_IN)


def config_to_json(config: FamilyConfig) -> dict[str, Any]:
    """A family's config as a dict for `json.dump`."""
    fields = {f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    digest = {_DIGEST: config.digest} if isinstance(config, TracedConfig) else {}
    return {"family": config.family, **digest, **fields}


@errors.refusing(errors.ConfigError, "not the config of a family as config_to_json writes it")
def config_from_json(data: Mapping[str, Any]) -> FamilyConfig:
    """The inverse of `config_to_json`.

    Raises:
      UnknownNameError: the family or a field is unknown.
      ConfigError: the values of the fields do not fit, or the entry point of the family fails.
    """
    name: Any = data.get("family")
    if name not in _FAMILIES:
        _find(name)
    fields = {k: _from_plain(v) for k, v in data.items() if k not in ("family", _DIGEST)}
    known = {f.name for f in dataclasses.fields(_FAMILIES[name])}
    for field in fields:
        errors.check_name(f"field of {name}'s config", field, known)
    with errors.refusing(errors.ConfigError, f"the config of family '{name}' does not fit"):
        config = _FAMILIES[name](**fields)
    if isinstance(config, TracedConfig) and data.get(_DIGEST, config.digest) != config.digest:
        raise errors.ConfigError(
            f"the code of family '{name}' computes something else now (digest {config.digest}) than when this was written "
            f"({data[_DIGEST]}); use the code of that time, or train and export again"
        )
    return config


def _find(name: Any) -> None:
    """Registers the family of a user's module. Raises UnknownNameError if there is none."""
    for module in filter(None, os.environ.get(foreign.IMPORT, "").split(os.pathsep)):
        foreign.import_module(module)
    if name in _FAMILIES:
        return
    installed = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        unknown = errors.unknown_name("family", name, {*_FAMILIES, *installed})
        raise errors.UnknownNameError(
            f"{unknown}. A family of your own is known after its module was imported. Give a program `--import my_module` or "
            f"`--import my_file.py`, or give your package an entry point of the group '{ENTRY_POINTS}' (see docs/families.md)"
        )
    _load(installed[name])


def _load(entry: EntryPoint) -> None:
    where = f"the entry point '{entry.name} = {entry.value}' of the group '{ENTRY_POINTS}'"
    try:
        found = entry.load()
    except Exception as e:  # any exception: it is the code of another package
        raise errors.ConfigError(f"{where} cannot be loaded: {type(e).__name__}: {errors.one_line(e)}") from e
    if isinstance(found, type):
        register(found)
    if entry.name not in _FAMILIES:
        raise errors.ConfigError(f"{where} registers no family of the name '{entry.name}'; both names must be equal")


def _to_plain(value: Any) -> Any:
    if isinstance(value, Subnet):
        return value.to_json()
    return config_to_json(value) if isinstance(value, FamilyConfig) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return config_from_json(value) if "family" in value else Subnet.from_json(value)
    return tuple(_from_plain(v) for v in value) if isinstance(value, list) else value
