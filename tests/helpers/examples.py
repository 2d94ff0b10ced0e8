"""The modules of docs/examples, each executed once in a process."""

import functools
import pathlib
import types

from superserve_jax import foreign

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "examples"


@functools.cache
def example(name: str) -> types.ModuleType:
    """The module docs/examples/NAME.py."""
    return foreign.execute(FOLDER / f"{name}.py")
