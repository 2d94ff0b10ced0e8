"""A run's folder: what training, search, calibration and evaluation leave there, and how to read it back.

config.json        the resolved config
checkpoints/       Orbax: step, parameters, optimiser state, average; checkpoints.json: their SHA-256
metrics.jsonl/png  the course of training; validation.jsonl, tensorboard/
search.json/png    candidates and the subnets chosen to be served; search.jsonl: what was tried, for going on
statistics.npz     SubnetNorm rows of the served subnets
evaluation.json    their accuracies on test data
export/            the export, see checkpoint.py
"""

import dataclasses
import io
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from superserve_jax import errors, files
from superserve_jax import subnet as subnets
from superserve_jax.supernets import programs, supernet
from superserve_jax.training import checkpoints, data, records
from superserve_jax.training import config as configs

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of one run. Made by `create`, opened again by `Run.open`.

    Args:
      workdir: the folder.
      config: the experiment.
      given: the dataset, where it is not that of the config.
    """

    workdir: pathlib.Path
    config: configs.TrainConfig
    given: data.Dataset | None = None

    @staticmethod
    def create(config: configs.TrainConfig, workdir: str | os.PathLike[str], *, dataset: data.Dataset | None = None) -> "Run":
        """The run of `config` in `workdir`, new or gone on with. Raises ConfigError where another config made the folder."""
        workdir = pathlib.Path(workdir)
        path = workdir / "config.json"
        if path.exists():
            # Through a config, since an older version may not have written every field.
            changed = configs.differences(configs.to_json(configs.from_json(_read(path))), configs.to_json(config))
            if changed:
                raise errors.ConfigError(
                    f"{workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or "
                    f"remove that folder"
                )
        else:
            files.write_json(path, configs.to_json(config))
        return Run(workdir, config, dataset)

    @staticmethod
    def open(workdir: str | os.PathLike[str], *, dataset: data.Dataset | None = None) -> "Run":
        """An existing run. Raises ConfigError where the folder holds none."""
        workdir = pathlib.Path(workdir)
        if not (workdir / "config.json").is_file():
            raise errors.ConfigError(
                f"{workdir} is not the folder of a run: it has no config.json; train one first, "
                f"for example with `python train/supernet.py configs/digits_resnet.py`"
            )
        return Run(workdir, configs.from_json(_read(workdir / "config.json")), dataset)

    def dataset(self) -> data.Dataset:
        """What the run trains on. Raises as `data.open` does, and ConfigError where only its maker knows."""
        if self.given is None and self.config.data is None:
            raise errors.ConfigError(
                f"the run in {self.workdir} was trained on a dataset that its config does not name: give it again, as "
                f"Run.open({str(self.workdir)!r}, dataset=...)"
            )
        return self.given or data.open(self.config.data)

    def checkpoints(self) -> checkpoints.Checkpoints:
        """The run's checkpoints; close them after use."""
        return checkpoints.Checkpoints(self.workdir)

    def model(self) -> supernet.SuperNet:
        """The SuperNet of the last checkpoint, with the statistics that calibration left: its averaged parameters, where the
        run keeps an average."""
        with self.checkpoints() as saved:
            step = saved.latest()
            if step is None:
                raise errors.ConfigError(f"{self.workdir} has no checkpoint yet; train it first")
            name = "ema" if self.config.ema else "params"
            params = saved.restore(step, **{name: programs.param_spec(self.config.model)})[name]
        return supernet.SuperNet(self.config.model, params, self.rows())

    def start_from(self, model: supernet.SuperNet) -> None:
        """Makes a model's weights and statistics those of step 0, from which training and the later stages go on.

        Raises:
          ConfigError: the run has a checkpoint already, or is of another network.
        """
        if model.config != self.config.model:
            raise errors.ConfigError(f"{self.workdir} is a run of {self.config.model}, not of {model.config}")
        with self.checkpoints() as saved:
            if (step := saved.latest()) is not None:
                raise errors.ConfigError(f"{self.workdir} has a checkpoint already, of step {step}; choose another folder")
            opt_state = self.config.optim.create(1).init(model.params)  # the number of steps does not matter to it
            saved.save(0, params=model.params, opt_state=opt_state, ema=model.params if self.config.ema else {})
        if model.rows:
            self.save_rows(model.rows)

    def rows(self) -> dict[subnets.Subnet, np.ndarray]:
        """The calibrated statistics; empty before calibration."""
        path = self.workdir / "statistics.npz"
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            order = json.loads(str(arrays["subnets"]))
            return {subnets.Subnet.from_json(s): arrays[f"row{i}"] for i, s in enumerate(order)}

    def save_rows(self, rows: Mapping[subnets.Subnet, np.ndarray]) -> None:
        """Writes statistics.npz."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"row{i}": row for i, row in enumerate(rows.values())}
        np.savez(buffer, subnets=np.array(json.dumps([s.to_json() for s in rows])), **arrays)
        files.write_bytes(self.workdir / "statistics.npz", buffer.getvalue())

    def metrics(self) -> list[dict[str, float]]:
        """The course of training, one dict per line of metrics.jsonl."""
        return records.read(self.workdir)

    def read(self, name: str, *, made_by: str) -> Any:
        """A JSON file of the run. Raises ConfigError, naming the program that makes it, where it is not there."""
        if not (self.workdir / name).is_file():
            raise errors.ConfigError(f"{self.workdir} has no {name} yet; make it with `python {made_by} {self.workdir}`")
        return _read(self.workdir / name)

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run."""
        files.write_json(self.workdir / name, value)

    def served(self) -> list[subnets.Subnet]:
        """The subnets that the search chose, in ascending order of FLOPs."""
        return [subnets.Subnet.from_json(s) for s in self.read("search.json", made_by="train/search.py")["served"]]


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise errors.ConfigError(f"cannot read {path}: {e}") from e
