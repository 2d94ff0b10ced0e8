"""The families of SuperNets, by name.

A family is a frozen config dataclass with a class variable `family` and the methods `create(rngs)`, `input_spec(batch)`,
`space()`, `sizes(subnet)`, `norm_sizes(sizes)`, `flops(subnet)` and `num_params(subnet)`; the module that `create` makes is
called as `module(inputs, sizes, stats)`. `ofa_resnet.py` is the example to follow; `register` makes a new one loadable.

A family whose inputs have a length also has `max_length`, `pad_id`, `input_spec(batch, length=...)` and `pack`, as those of
`dynabert.py`, and is served in length buckets (see `serving.padding`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from superserve_jax import errors
from superserve_jax.supernets import dynabert, ofa_resnet

_FAMILIES: dict[str, type] = {c.family: c for c in (ofa_resnet.OFAResNetConfig, dynabert.DynaBERTConfig)}


def register(config_class: type) -> type:
    """Makes a family known under its `family` name, so that exports of it can be loaded. Usable as a class decorator."""
    _FAMILIES[config_class.family] = config_class
    return config_class


def config_to_json(config: Any) -> dict[str, Any]:
    """A family's config as a dict for `json.dump`."""
    return {"family": config.family, **dataclasses.asdict(config)}


def config_from_json(data: Mapping[str, Any]) -> Any:
    """The inverse of `config_to_json`. Raises UnknownNameError for an unknown family, ConfigError for unfit fields."""
    fields = {k: _tuples(v) for k, v in data.items() if k != "family"}
    name = data.get("family")
    if name not in _FAMILIES:
        raise errors.unknown_name("family", name, _FAMILIES)
    known = {f.name for f in dataclasses.fields(_FAMILIES[name])}
    if surplus := set(fields) - known:
        raise errors.unknown_name(f"field of {name}'s config", sorted(surplus)[0], known)
    try:
        return _FAMILIES[name](**fields)
    except (TypeError, AttributeError, IndexError) as e:
        raise errors.ConfigError(f"the config of family '{name}' does not fit: {e}") from e


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
