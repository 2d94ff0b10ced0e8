"""The families of SuperNets, by name.

A family is a frozen config dataclass with a class variable `family`, the field `num_classes` and the methods `create(rngs)`,
`input_spec(batch)`, `space()`, `sizes(subnet)`, `norm_sizes(sizes)`, `flops(subnet)` and `num_params(subnet)`; the module that
`create` makes is called as `module(inputs, sizes, stats)`. With `units()`, too, training can rewire it.

A family whose inputs have a length also has `max_length`, `pad_id`, `input_spec(batch, length=...)` and `pack`, as those of
`dynabert.py`, and is served in length buckets (see `scheduling.length_queue`).

A family whose file stands in this folder is known; `register` makes one known that stands elsewhere. `ofa_resnet.py` is the
example to follow, tests/test_third_family.py a small one.
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
    """Makes a family known under its `family` name, so that its runs and exports can be read. Usable as a class decorator."""
    _FAMILIES[config_class.family] = config_class
    return config_class


def config_to_json(config: FamilyConfig) -> dict[str, Any]:
    """A family's config as a dict for `json.dump`."""
    return {"family": config.family, **{f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}}


@errors.refusing(errors.ConfigError, "not the config of a family as config_to_json writes it")
def config_from_json(data: Mapping[str, Any]) -> FamilyConfig:
    """The inverse of `config_to_json`. Raises UnknownNameError for an unknown family, ConfigError for unfit fields."""
    name = data.get("family")
    if name not in _FAMILIES:
        # Data never names code to run: a family is known only where its module was imported.
        unknown = errors.unknown_name("family", name, _FAMILIES)
        raise errors.UnknownNameError(f"{unknown}; import the module that registers it first (families.register)")
    fields = {k: _from_plain(v) for k, v in data.items() if k != "family"}
    known = {f.name for f in dataclasses.fields(_FAMILIES[name])}
    if surplus := set(fields) - known:
        raise errors.unknown_name(f"field of {name}'s config", sorted(surplus)[0], known)
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
