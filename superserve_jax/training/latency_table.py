"""Latency tables: the latencies of some subnets on one device, in a JSON file. A linear model predicts all other subnets.

The table holds whole subnets and not the times of single blocks, which would be added up. A compiled network fuses layers, and
the time of a small network is mostly overhead per layer. Single blocks would miss both. `latency.py` has the linear model.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from superserve_jax import errors, families, files
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import latency

_FORMAT = "superserve-latency-table-1"
_MEASURED = 40  # subnets


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Latencies that were measured on one device.

    Args:
      device: the device's name, such as "NVIDIA H100".
      batch: the batch size.
      model: the config of the network, as `families.config_to_json` gives it.
      latencies: milliseconds of one batch, by subnet. At least three subnets.
    """

    device: str
    batch: int
    model: Mapping[str, Any]
    latencies: Mapping[Subnet, float]

    @staticmethod
    def measure(model: SuperNet, *, device: str, batch: int, seed: int = 0, count: int = _MEASURED) -> "LatencyTable":
        """Measures about `count` subnets of a model on the first device, from the smallest to the largest."""
        subnets = latency.spread(model.config, count, seed=seed)
        measured = latency.measure(model, subnets, batch=batch)
        return LatencyTable(device, batch, _plain(model.config), measured)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> "LatencyTable":
        """Reads a table that `write` wrote. Raises ConfigError if the file is missing or is no latency table."""
        where = files.user_path(path)
        if not where.is_file():
            raise errors.ConfigError(f"no latency table {where}; give a file that a search under a latency has written")
        with errors.refusing(errors.ConfigError, f"{where} is not a latency table; measure it again"):
            values = json.loads(files.read_bytes(where))
            if values["format"] != _FORMAT:
                raise errors.ConfigError(f"{where} has the format {values['format']!r}, expected {_FORMAT!r}")
            device, batch = msgspec.convert(values["device"], str), msgspec.convert(values["batch"], int)
            pairs = [(Subnet.from_json(entry["subnet"]), float(entry["ms"])) for entry in values["latencies"]]
            if len(pairs) < 3 or not all(0 < ms < 1e12 for _, ms in pairs):
                raise ValueError("it needs three or more subnets, each with milliseconds above 0")
            return LatencyTable(device, batch, dict(values["model"]), dict(pairs))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
        entries = [{"subnet": s.to_json(), "ms": ms} for s, ms in self.latencies.items()]
        head = {"format": _FORMAT, "device": self.device, "batch": self.batch, "model": self.model}
        files.write_json(path, {**head, "latencies": entries})

    def predictor(self, config: FamilyConfig) -> latency.Predictor:
        """Predicts the latency of any subnet. Raises ConfigError if the table is of another network than `config`."""
        if self.model != _plain(config):
            raise errors.ConfigError(
                f"the latency table of '{self.device}' is of another network than the run: {dict(self.model)}; measure the "
                f"run's network on that device"
            )
        return latency.Predictor(config, self.latencies)


def file_name(device: str, batch: int) -> str:
    """The name of a table's file.

    >>> file_name("NVIDIA H100 80GB", 1)
    'nvidia-h100-80gb-batch1.json'
    """
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')[:100]}-batch{batch}.json"


def _plain(config: FamilyConfig) -> dict[str, Any]:
    return json.loads(json.dumps(families.config_to_json(config)))
