"""The families of SuperNets, by name. The built-in ones are `ofa_resnet.py`,
`ofa_mobilenet.py`, `dynabert.py` and `vit.py`.

To add a family:

1. Write a frozen dataclass with the members of `supernets.FamilyConfig`, and a network of elastic layers (`layers.py`).
   Decorate the dataclass with `families.register`.
2. Verify the family: `supernets.check(config)`.
3. Give every program `--import my_module`, or name the family as an entry point (see `supernets/registry.py`). A family in a
   file of this folder needs neither, since every file here is imported.

docs/families.md explains each step, with an example. `ofa_resnet.py` is the full example. `vit.py` and
`ofa_mobilenet.py` are plain modules, which `tracing` makes elastic.
"""

import importlib
import pkgutil

from superserve_jax.supernets.registry import config_from_json, config_to_json, register

__all__ = ["config_from_json", "config_to_json", "register"]


def _register_files() -> None:
    """Registers the family of every file in this folder."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__ and isinstance(vars(value).get("family"), str):
                register(value)


_register_files()
