"""The folder of a run: the files that training and the later stages write, and functions to read them.

One file because each stage reads what an earlier one wrote.

| file | content |
|---|---|
| config.json | the resolved config |
| inputs.json | fingerprints of the dataset and of an outside teacher, see `data/fingerprints.py` |
| checkpoints/ | step, parameters, optimiser state and average, written by Orbax |
| checksums/ | the SHA-256 of every file of a checkpoint |
| set_aside/ | damaged checkpoints and metrics, and checkpoints without checksums |
| training.lock | the process that trains now, or trained last |
| converted.json | exists if the first checkpoint holds converted weights |
| vocabulary.txt | the tokens of a converted classifier of texts |
| metrics.jsonl, metrics.png | the training metrics |
| validation.jsonl, tensorboard/ | validation accuracies, and all metrics for TensorBoard |
| wandb.json, wandb/ | the id and the local files of a Weights & Biases run |
| search.json, search.png | the candidates, and the subnets to serve |
| search.jsonl | the candidates one by one, so that an interrupted search can go on |
| constrained.json | the result of a search under constraints |
| constrained.jsonl | the subnets that these searches evaluated |
| latency_tables/ | latencies of some subnets, one file for each device and batch size |
| statistics.npz | SubnetNorm statistics of the calibrated subnets |
| evaluation.json | test accuracies of the served subnets |
| export/ | the export |
| alone/ | the runs of standalone subnets, see `stages.standalone` |
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from superserve_jax import errors, files, manifest
from superserve_jax.exports import Served, statistics
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import data, metrics_log
from superserve_jax.training.checkpoints import Checkpoints
from superserve_jax.training.config import TrainConfig, config_differences, config_from_json, config_to_json
from superserve_jax.training.data import DatasetLike, TextFileConfig, fingerprints

T = TypeVar("T")

_log = logging.getLogger(__name__)

VOCABULARY = "vocabulary.txt"
_CONVERTED = "converted.json"
_STATISTICS = "statistics.npz"
_INPUTS = "inputs.json"
_MOST_BYTES = 1 << 30  # of a JSON file
# Fields with paths. They may change, because inputs.json tells whether the same data is there.
_PATHS = ("data.path", "data.data_dir", "data.vocabulary", "distill.teacher")
# Fields that may change because the weights do not depend on them.
_RECORDS = ("checkpoint_every", "eval_every", "log_every", "wandb", "search")


def check_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """`workdir` as a path. Raises ConfigError if no folder can be made there."""
    with errors.refusing(errors.ConfigError, f"workdir must be the path of a folder, got {workdir!r}"):
        path = files.user_path(workdir)
    above = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise errors.ConfigError(f"workdir {path} cannot be made: {above} is not a folder with permission to write")
    return path


def check_unused(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Raises ConfigError if a folder has a checkpoint or a run of another config. Writes nothing."""
    if manifest.is_run(workdir):
        _refuse_changes(Run.open(workdir), config)
    if (workdir / "checkpoints").exists():
        with Checkpoints(workdir) as saved:
            if (step := saved.latest()) is not None:
                raise errors.ConfigError(f"{workdir} already has a checkpoint, of step {step}; choose another --workdir")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run and its folder. `Run.create` makes it, `Run.open` opens it again.

    Args:
      workdir: the folder.
      config: the experiment.
      given: the dataset, if it was passed as an argument and the config does not name it.
    """

    workdir: pathlib.Path
    config: TrainConfig
    given: DatasetLike | None = None

    @staticmethod
    def create(config: TrainConfig, workdir: str | os.PathLike[str], *, dataset: DatasetLike | None = None) -> "Run":
        """The run of `config` in `workdir`, new or existing. Raises ConfigError if another config made the folder."""
        workdir = files.user_path(workdir)
        if not manifest.is_run(workdir):
            files.write_json(workdir / manifest.RUN_CONFIG, config_to_json(config))
        else:  # An older version may not have written every field, so compare the config that its values give.
            _refuse_changes(Run.open(workdir), config)
        return Run(workdir, config, dataset)

    @staticmethod
    def open(workdir: str | os.PathLike[str], *, dataset: DatasetLike | None = None) -> "Run":
        """An existing run. Raises ConfigError if the folder holds none."""
        workdir = files.user_path(workdir)
        if not manifest.is_run(workdir):
            hint = manifest.hint(workdir, "run") or "train one first, for example with `superserve train digits_resnet`"
            raise errors.ConfigError(f"{workdir} is not the folder of a run: it has no {manifest.RUN_CONFIG}; {hint}")
        remedy = "restore it, or train in another folder"
        config = _read(workdir / manifest.RUN_CONFIG, remedy, config_from_json)
        return Run(workdir, _with_own_vocabulary(config, workdir), dataset)

    @staticmethod
    def convert(config: TrainConfig, workdir: str | os.PathLike[str], model: SuperNet) -> "Run":
        """A run whose step 0 has the weights and statistics of a model. Training and the later stages go on from there.

        Raises:
          ConfigError: the folder has a checkpoint or another config, or the model's network is not the config's.
          DataError: the disk is full.
        """
        workdir = files.user_path(workdir)
        if model.config != config.model:
            raise errors.ConfigError(f"{workdir} is a run of {config.model}, not of {model.config}")
        check_unused(config, workdir)
        # Written first: without this file, a run that lost its checkpoint would be trained from random weights.
        if not manifest.is_run(workdir):
            files.write_json(workdir / _CONVERTED, {"parameters": sum(p.size for p in model.params.values())})
        run = Run.create(config, workdir)
        with run.checkpoints() as saved:
            opt_state = config.optim.create(1).init(model.params)  # its initial state does not depend on the number of steps
            saved.save(0, params=model.params, opt_state=opt_state, ema=model.params if config.ema else {})
        if model.statistics:
            run.save_statistics(model.statistics)
        return run

    def check_data(self, config: TrainConfig) -> None:
        """Raises ConfigError if another config has another dataset. The dataset is not opened."""
        _refuse_changes(self, dataclasses.replace(self.config, data=config.data))

    def dataset(self) -> DatasetLike:
        """The dataset that the run trains on.

        Raises as `data.open` does; ConfigError if the config does not name it; DataError if it has changed since the training.
        """
        if self.given is not None:
            dataset = self.given
        elif self.config.data is not None:
            # The training decoded all images already, and inputs.json tells whether they are the same.
            dataset = data.open(self.config.data, decode=not (self.workdir / _INPUTS).exists())
        elif self.converted:
            raise errors.ConfigError(
                f"the run in {self.workdir} was converted without texts; convert into another folder with --texts FILE, or "
                f"pass your data, as Run.open({str(self.workdir)!r}, dataset=...)"
            )
        else:
            raise errors.ConfigError(
                f"the run in {self.workdir} was trained on a dataset that its config does not name: pass it again, as "
                f"Run.open({str(self.workdir)!r}, dataset=...)"
            )
        if (self.workdir / _INPUTS).exists():
            self.check_inputs({"data": data.fingerprint(dataset)})
        return dataset

    def check_inputs(self, found: Mapping[str, Any]) -> None:
        """Raises DataError if fingerprints are not the same as when the run began. A run without any passes.

        Args:
          found: the fingerprints of "data" and, if an outside teacher is used, of "teacher".
        """
        path = self.workdir / _INPUTS
        if not path.exists():
            return
        remedy = "remove it to go on without knowing whether the data has changed"
        known = _read(path, remedy, lambda value: {name: value[name] for name in found})
        if changed := fingerprints.differences(known, found):
            only_times = all(change.endswith(": times") for change in changed)
            hint = " Only times of files differ; copy the files together with their times." if only_times else ""
            raise errors.DataError(
                f"the inputs of the run in {self.workdir} have changed since its training began ({'; '.join(changed[:5])})."
                f"{hint} Restore them, or choose another --workdir. If you know that they are the same, remove {path}"
            )

    def write_inputs(self, found: Mapping[str, Any], step: int) -> None:
        """Writes the fingerprints at the first start, with a warning if a training without any goes on from `step`."""
        if not (self.workdir / _INPUTS).exists():
            if step:
                _log.warning(
                    "%s has no %s, as after an older version. Its data may have changed; from now on a change is noticed",
                    *(self.workdir, _INPUTS),
                )
            self.write(_INPUTS, dict(found))
        if Run.open(self.workdir).config != self.config:  # fields that may change have changed
            self.write(manifest.RUN_CONFIG, config_to_json(self.config))

    @contextlib.contextmanager
    def training_lock(self) -> Iterator[None]:
        """Held by the process that trains. Raises ConfigError if another process trains in the same folder."""
        with contextlib.ExitStack() as held:
            lock = self.workdir / "training.lock"
            try:
                held.enter_context(files.locked(lock))
            except BlockingIOError as e:
                raise errors.ConfigError(
                    f"{self.workdir} is {e}, which trains there now; wait for it, stop it, or choose another --workdir"
                ) from e
            except OSError as e:
                raise files.cannot_write(lock, e) from e
            yield

    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints; close them after use."""
        return Checkpoints(self.workdir)

    def model(self) -> SuperNet:
        """The SuperNet of the last checkpoint with its calibrated statistics.

        Its parameters are the averaged ones if the run keeps an average.
        """
        with self.checkpoints() as saved:
            step = saved.latest()
            if step is None:
                raise errors.ConfigError(f"{self.workdir} has no checkpoint yet; train it first")
            name = "ema" if self.config.ema else "params"
            params = saved.restore(step, **{name: programs.param_spec(self.config.model)})[name]
        return SuperNet(self.config.model, params, self.statistics())

    @property
    def converted(self) -> bool:
        """Whether the run began with converted weights."""
        return (self.workdir / _CONVERTED).exists()

    def forget_stages(self) -> None:
        """Removes the results of search, calibration and evaluation: further training changes the weights."""
        for name in ("search.json", "constrained.json", _STATISTICS, "evaluation.json"):
            (self.workdir / name).unlink(missing_ok=True)

    def statistics(self) -> dict[Subnet, np.ndarray]:
        """The calibrated statistics; empty before calibration."""
        path = self.workdir / _STATISTICS
        if path.exists() and not path.is_file():
            raise errors.ConfigError(f"{path} is not a regular file; remove it and calibrate again")
        return statistics.read(path, self.config.model) if path.exists() else {}

    def save_statistics(self, calibrated: Mapping[Subnet, np.ndarray]) -> None:
        """Writes statistics.npz."""
        statistics.write(self.workdir / _STATISTICS, calibrated)

    def metrics(self, kind: Literal["train", "validation"] = "train") -> list[dict[str, float]]:
        """The metrics of training or validation, one dict per line of metrics.jsonl or validation.jsonl."""
        return metrics_log.read(self.workdir, kind)

    def read(self, name: str, *, made_by: str, parse: Callable[[Any], T] = lambda value: value) -> T:
        """A JSON file of the run. If it is missing or damaged, raises ConfigError with the program that makes it.

        Args:
          name: the file's name.
          made_by: the command that writes it, such as "superserve search".
          parse: makes the result from the JSON value.
        """
        path, remedy = self.workdir / name, f"`{made_by} {self.workdir}`"
        if not path.exists():
            raise errors.ConfigError(f"{self.workdir} has no {name} yet; make it with {remedy}")
        return _read(path, f"make it again with {remedy}", parse)

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run."""
        files.write_json(self.workdir / name, value)

    def served(self) -> list[Subnet]:
        """The subnets that the search chose, in ascending order of FLOPs."""
        return self.read(
            "search.json", made_by="superserve search", parse=lambda found: [Subnet.from_json(s) for s in found["served"]]
        )

    def evaluated(self) -> list[Served]:
        """The test accuracies of the served subnets."""
        return self.read(
            "evaluation.json", made_by="superserve evaluate", parse=lambda found: [Served.from_json(s) for s in found]
        )


def _with_own_vocabulary(config: TrainConfig, workdir: pathlib.Path) -> TrainConfig:
    """The config with the path of the vocabulary that conversion wrote into the folder. The folder may have been moved."""
    own = workdir.absolute() / VOCABULARY
    if not (workdir / _CONVERTED).exists() or not own.exists() or not isinstance(config.data, TextFileConfig):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, vocabulary=str(own)))


def _refuse_changes(run: Run, config: TrainConfig) -> None:
    """Raises ConfigError if fields that may not change differ. Paths may, if the run can tell whether the data is the same."""
    free = (*_RECORDS, *_PATHS) if (run.workdir / _INPUTS).exists() else _RECORDS
    differences = config_differences(config_to_json(run.config), config_to_json(config))
    fields = ((change, change.split(":")[0]) for change in differences)
    if changed := [change for change, field in fields if field not in free and field.split(".")[0] not in free]:
        raise errors.ConfigError(
            f"{run.workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or "
            f"remove that folder"
        )


def _read(path: pathlib.Path, remedy: str, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a JSON file. If the file is damaged, raises ConfigError with the remedy."""
    try:
        return parse(json.loads(files.read_bytes(path, most=_MOST_BYTES)))
    except (OSError, *errors.MALFORMED) as e:
        raise errors.ConfigError(f"{path} is damaged or cannot be read: {type(e).__name__}: {e}; {remedy}") from e
