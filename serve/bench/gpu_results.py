"""The file of results of `serve/bench/gpu.py`, which the stages write as their results come."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from superserve_jax import errors, files


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of all stages with one config.

    Args:
      path: the file.
      config: the config of the network.
      quick: whether the stages had few repeats.
    """

    path: pathlib.Path
    config: str
    quick: bool

    def read(self) -> dict[str, Any]:
        """The results by stage. Raises ConfigError for results of another config or --quick."""
        try:
            file = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        if (file["config"], file["quick"]) != (self.config, self.quick):
            quick = " with --quick" if file["quick"] else ""
            raise errors.ConfigError(f"{self.path} has results of {file['config']}{quick}; name another folder with --out")
        return file["stages"]

    def save(self, stage: str, found: Any, state: str = "begun") -> None:
        """Writes the results that a stage has so far. Of an unfinished stage, earlier results stay if they are more."""
        if state == "done" or size(found) >= size(self.read().get(stage, {}).get("found")):
            self.write(stage, {"state": state, "device": jax.devices()[0].device_kind, "found": found})

    def write(self, stage: str, value: Mapping[str, Any]) -> None:
        """Replaces what the file has about a stage."""
        stages = {**self.read(), stage: value}
        files.write_json(self.path, {"config": self.config, "quick": self.quick, "stages": stages})


def size(found: Any) -> int:
    """The number of values in results."""
    return len(jax.tree.leaves(found))
