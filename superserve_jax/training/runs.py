"""A run's folder: what training, search, calibration and evaluation leave there, and how to read it back.

config.json        the resolved config
checkpoints/       Orbax: step, parameters, optimiser state, average; checksums/: their SHA-256
converted.json     where the first checkpoint is of converted weights
metrics.jsonl/png  the course of training; validation.jsonl, tensorboard/
search.json/png    candidates and the subnets chosen to be served; search.jsonl: what was tried, for going on
statistics.npz     SubnetNorm statistics of the served subnets, see exports/statistics.py
evaluation.json    their accuracies on test data
export/            the export, see checkpoint.py
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from superserve_jax import errors, files
from superserve_jax.exports import statistics
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import data, metrics_log
from superserve_jax.training.checkpoints import Checkpoints
from superserve_jax.training.config import TrainConfig, config_differences, config_from_json, config_to_json
from superserve_jax.training.data import Dataset

_log = logging.getLogger(__name__)

_CONVERTED = "converted.json"
_STATISTICS = "statistics.npz"


def check_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """`workdir` as a path. Raises ConfigError where no folder can be there."""
    with errors.refusing(errors.ConfigError, f"workdir must be the path of a folder, got {workdir!r}"):
        path = pathlib.Path(workdir)
    above = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise errors.ConfigError(f"workdir {path} cannot be made: {above} is no folder that one may write to")
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of one run. Made by `create`, opened again by `Run.open`.

    Args:
      workdir: the folder.
      config: the experiment.
      given: the dataset, where it is not that of the config.
    """

    workdir: pathlib.Path
    config: TrainConfig
    given: Dataset | None = None

    @staticmethod
    def create(config: TrainConfig, workdir: str | os.PathLike[str], *, dataset: Dataset | None = None) -> "Run":
        """The run of `config` in `workdir`, new or gone on with. Raises ConfigError where another config made the folder."""
        workdir = pathlib.Path(workdir)
        path = workdir / "config.json"
        if path.exists():
            # Through a config, since an older version may not have written every field.
            changed = config_differences(config_to_json(config_from_json(_read(path))), config_to_json(config))
            if changed:
                raise errors.ConfigError(
                    f"{workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or "
                    f"remove that folder"
                )
        else:
            files.write_json(path, config_to_json(config))
        return Run(workdir, config, dataset)

    @staticmethod
    def open(workdir: str | os.PathLike[str], *, dataset: Dataset | None = None) -> "Run":
        """An existing run. Raises ConfigError where the folder holds none."""
        workdir = pathlib.Path(workdir)
        if not (workdir / "config.json").is_file():
            raise errors.ConfigError(
                f"{workdir} is not the folder of a run: it has no config.json; train one first, "
                f"for example with `python train/supernet.py configs/digits_resnet.py`"
            )
        return Run(workdir, config_from_json(_read(workdir / "config.json")), dataset)

    def dataset(self) -> Dataset:
        """What the run trains on. Raises as `data.open` does, and ConfigError where only its maker knows."""
        if self.given is None and self.config.data is None:
            raise errors.ConfigError(
                f"the run in {self.workdir} was trained on a dataset that its config does not name: give it again, as "
                f"Run.open({str(self.workdir)!r}, dataset=...)"
            )
        return self.given or data.open(self.config.data)

    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints; close them after use."""
        return Checkpoints(self.workdir)

    def model(self) -> SuperNet:
        """The SuperNet of the last checkpoint, with the statistics that calibration left: its averaged parameters, where the
        run keeps an average."""
        with self.checkpoints() as saved:
            step = saved.latest()
            if step is None:
                raise errors.ConfigError(f"{self.workdir} has no checkpoint yet; train it first")
            name = "ema" if self.config.ema else "params"
            params = saved.restore(step, **{name: programs.param_spec(self.config.model)})[name]
        return SuperNet(self.config.model, params, self.statistics())

    @staticmethod
    def convert(config: TrainConfig, workdir: str | os.PathLike[str], model: SuperNet) -> "Run":
        """A run whose step 0 has a model's weights and statistics, from which training and the later stages go on.

        Raises:
          ConfigError: the folder has a checkpoint already, or is of another config, or the model of another network.
          DataError: the disk is full.
        """
        workdir = pathlib.Path(workdir)
        if model.config != config.model:
            raise errors.ConfigError(f"{workdir} is a run of {config.model}, not of {model.config}")
        # First, since a run without it that has no checkpoint would be trained from random weights.
        if not (workdir / "config.json").exists():
            files.write_json(workdir / _CONVERTED, {"parameters": sum(p.size for p in model.params.values())})
        run = Run.create(config, workdir)
        with run.checkpoints() as saved:
            if (step := saved.latest()) is not None:
                raise errors.ConfigError(f"{workdir} has a checkpoint already, of step {step}; choose another folder")
            opt_state = config.optim.create(1).init(model.params)  # the number of steps does not matter to it
            saved.save(0, params=model.params, opt_state=opt_state, ema=model.params if config.ema else {})
        if model.statistics:
            run.save_statistics(model.statistics)
        return run

    @property
    def converted(self) -> bool:
        """Whether the run began with converted weights."""
        return (self.workdir / _CONVERTED).exists()

    def forget_stages(self) -> None:
        """Removes what search, calibration and evaluation found, since it is of other weights once training goes on."""
        for name in ("search.json", _STATISTICS, "evaluation.json"):
            (self.workdir / name).unlink(missing_ok=True)

    def statistics(self) -> dict[Subnet, np.ndarray]:
        """The calibrated statistics. Empty before calibration."""
        path = self.workdir / _STATISTICS
        return statistics.read(path, self.config.model) if path.exists() else {}

    def save_statistics(self, calibrated: Mapping[Subnet, np.ndarray]) -> None:
        """Writes statistics.npz."""
        statistics.write(self.workdir / _STATISTICS, calibrated)

    def metrics(self) -> list[dict[str, float]]:
        """The course of training, one dict per line of metrics.jsonl."""
        return metrics_log.read(self.workdir)

    def read(self, name: str, *, made_by: str) -> Any:
        """A JSON file of the run. Raises ConfigError, naming the program that makes it, where it is not there."""
        if not (self.workdir / name).is_file():
            raise errors.ConfigError(f"{self.workdir} has no {name} yet; make it with `python {made_by} {self.workdir}`")
        return _read(self.workdir / name)

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run."""
        files.write_json(self.workdir / name, value)

    def served(self) -> list[Subnet]:
        """The subnets that the search chose, in ascending order of FLOPs."""
        return [Subnet.from_json(s) for s in self.read("search.json", made_by="train/search.py")["served"]]


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise errors.ConfigError(f"cannot read {path}: {e}") from e
