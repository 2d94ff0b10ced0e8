"""Latency tables: the latencies of some subnets on one device, in a JSON file. A linear model predicts all other subnets.

The table holds whole subnets and not the times of single blocks, which would be added up. A compiled network fuses layers, and
the time of a small network is mostly overhead per layer. Single blocks would miss both. `latency.py` has the linear model.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from superserve_jax import errors, families, files
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import latency

_log = logging.getLogger(__name__)

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

    Raises:
      ConfigError: the batch size is not a whole number from 1 up, or there are too few latencies, or one is not above 0.
    """

    device: str
    batch: int
    model: Mapping[str, Any]
    latencies: Mapping[Subnet, float]

    def __post_init__(self):
        if type(self.batch) is not int or self.batch < 1:
            raise errors.ConfigError(f"batch must be a whole number from 1 up, got {self.batch!r}")
        odd = [ms for ms in self.latencies.values() if not 0 < ms < 1e12]
        if odd or len(self.latencies) < 3:
            got = f"{odd[0]} ms" if odd else f"{len(self.latencies)} subnets"
            raise errors.ConfigError(f"it needs three or more different subnets, each with milliseconds above 0, got {got}")

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
        try:
            values = json.loads(files.read_bytes(where))
            if values["format"] != _FORMAT:
                raise ValueError(f"it has the format {values['format']!r}, expected {_FORMAT!r}")
            latencies = {Subnet.from_json(entry["subnet"]): float(entry["ms"]) for entry in values["latencies"]}
            return LatencyTable(msgspec.convert(values["device"], str), values["batch"], dict(values["model"]), latencies)
        except (OSError, *errors.MALFORMED) as e:
            reason = errors.one_line(e)[:300]
            raise errors.ConfigError(f"{where} is not a latency table ({type(e).__name__}: {reason}); measure it again") from e

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
        entries = [{"subnet": s.to_json(), "ms": ms} for s, ms in self.latencies.items()]
        head = {"format": _FORMAT, "device": self.device, "batch": self.batch, "model": self.model}
        files.write_json(path, {**head, "latencies": entries})

    def predictor(self, config: FamilyConfig) -> latency.Predictor:
        """Predicts the latency of any subnet. Raises ConfigError if the table is of another network than `config`."""
        again = "measure the run's network on that device"
        if self.model != _plain(config):
            raise errors.ConfigError(
                f"the latency table of '{self.device}' is of another network than the run: {dict(self.model)}; {again}"
            )
        try:
            latencies = {config.space().validate(subnet): ms for subnet, ms in self.latencies.items()}
        except errors.SubnetError as e:
            raise errors.ConfigError(
                f"the latency table of '{self.device}' has a subnet of another network than the run: {e}; {again}"
            ) from e
        return latency.Predictor(config, latencies)


def read_or_measure(folder: pathlib.Path, model: SuperNet, *, device: str, batch: int, seed: int = 0) -> LatencyTable:
    """The table of the first device in a folder. If there is none, it is measured and written.

    Args:
      folder: the folder of the tables.
      model: the SuperNet.
      device: the name of the device.
      batch: the batch size.
      seed: chooses the subnets to measure.
    """
    path = folder / file_name(device, batch)
    if path.exists():
        return LatencyTable.read(path)
    table = LatencyTable.measure(model, device=device, batch=batch, seed=seed)
    path.parent.mkdir(exist_ok=True)
    table.write(path)
    _log.info("%s has the latencies of %d subnets on '%s'", path, len(table.latencies), device)
    return table


def file_name(device: str, batch: int) -> str:
    """The name of a table's file.

    >>> file_name("NVIDIA H100 80GB", 1)
    'nvidia-h100-80gb-batch1.json'
    """
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')[:100]}-batch{batch}.json"


def _plain(config: FamilyConfig) -> dict[str, Any]:
    return json.loads(json.dumps(families.config_to_json(config)))
