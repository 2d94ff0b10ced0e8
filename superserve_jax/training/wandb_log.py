"""Training metrics in Weights & Biases. The library `wandb` is optional and is imported only if a config names a project.

W&B's own environment variables apply, such as WANDB_MODE=offline, WANDB_ENTITY and WANDB_API_KEY.
"""

import contextlib
import json
import logging
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from superserve_jax import errors, files
from superserve_jax.training.config import TrainConfig, config_to_json
from superserve_jax.training.metrics_log import Send

_log = logging.getLogger(__name__)

_ID = "wandb.json"


def check(project: str | None) -> None:
    """Raises ConfigError if a project is named, but `wandb` is not installed."""
    if project is not None:
        _library(project)


@contextlib.contextmanager
def sending(config: TrainConfig, workdir: pathlib.Path) -> Iterator[Send]:
    """Yields a function (kind, step, values by name) that sends metrics to the config's project, or does nothing without one.

    The run's id is in wandb.json. So a resumed training continues the same W&B run, which ignores steps that it has already.

    Args:
      config: the experiment.
      workdir: the run's folder.

    Raises:
      ConfigError: `wandb` is not installed, or cannot start a run.
    """
    if config.wandb is None:
        yield lambda kind, step, values: None
        return
    library = _library(config.wandb)
    try:
        run = library.init(
            project=config.wandb,
            name=config.name,
            id=_run_id(workdir),
            resume="allow",
            dir=str(workdir),
            config=config_to_json(config),
        )
    except Exception as e:  # its errors have no common class that all versions share
        raise errors.ConfigError(
            f"Weights & Biases cannot start a run in project '{config.wandb}': {type(e).__name__}: {e}. Run `wandb login`, or "
            f"set WANDB_MODE=offline, or leave out the project"
        ) from e

    failed = False

    def send(kind: str, step: int, values: Mapping[str, float]) -> None:
        nonlocal failed
        try:
            run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        except Exception as e:  # a lost point is no reason to stop training
            if not failed:
                _log.warning("Weights & Biases did not take the metrics of step %d: %s: %s", step, type(e).__name__, e)
            failed = True

    try:
        yield send
    finally:
        try:
            run.finish()
        except Exception as e:
            _log.warning("Weights & Biases could not finish the run: %s: %s", type(e).__name__, e)


def _library(project: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise errors.ConfigError(
            f"wandb={project!r} sends metrics to Weights & Biases, but `import wandb` fails ({e}): "
            "pip install 'superserve-jax[wandb]'"
        ) from e
    return wandb


def _run_id(workdir: pathlib.Path) -> str:
    """The id in the run's folder. A new one is written if there is none."""
    path = workdir / _ID
    if not path.exists():
        files.write_json(path, {"id": uuid.uuid4().hex[:8]})
    try:
        found = json.loads(files.read_bytes(path))["id"]
    except (OSError, *errors.MALFORMED) as e:
        raise errors.ConfigError(f"{path} is damaged: {type(e).__name__}: {e}; remove it to begin a new W&B run") from e
    return str(found)
