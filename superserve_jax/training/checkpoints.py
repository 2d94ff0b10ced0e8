"""A run's checkpoints: Orbax, with a SHA-256 of every file, since Orbax restores many a flipped bit without a word.

The sums stand in checkpoints.json beside the folder, written after the checkpoint: one that a kill, a full disk or a bad
sector has spoiled does not match them, and the one before takes its place.
"""

import contextlib
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from superserve_jax import errors, files

_log = logging.getLogger(__name__)

_KEPT = 2


class Checkpoints:
    """The checkpoints in a run's folder; a context manager.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._sums_path = self._folder.with_suffix(".json")
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The last step whose checkpoint is whole, None where there is none. Damaged ones after it are removed, with a
        warning each."""
        sums = self._sums()
        for step in sorted(self._manager.all_steps(), reverse=True):
            wrong = _difference(sums.get(str(step)), self._folder / str(step))
            if wrong is None:
                return step
            _log.warning(
                "the checkpoint of step %d in %s is damaged or was not finished (%s): it is removed, and the one before it "
                "is used",
                *(step, self._folder, wrong),
            )
            self._remove(step)
        return None

    def save(self, step: int, **items: Any) -> None:
        """Writes pytrees, such as `params` and `opt_state`, and returns when they are on disk.

        Raises:
          DataError: they cannot be written; the checkpoints before stand as they were.
        """
        args = {name: ocp.args.StandardSave(item) for name, item in items.items() if jax.tree.leaves(item)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
            self._manager.wait_until_finished()
            sums = {str(s): v for s in self._manager.all_steps() if (v := self._sums().get(str(s)))}
            files.write_json(self._sums_path, {**sums, str(step): _sums_of(self._folder / str(step))})
            return
        except Exception as e:  # Orbax passes on whatever its storage layer raises
            problem = repr(e)
        # Outside of the handler, which keeps Orbax' unfinished writes alive: they would complain when the interpreter ends.
        self._remove(step)
        gc.collect()
        raise errors.DataError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {problem}; make room on the disk"
        )

    def restore(self, step: int, **specs: Any) -> Any:
        """The named pytrees of a checkpoint, on the first device; each spec is one of shapes and dtypes."""
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), specs)
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items() if jax.tree.leaves(target)}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] if name in items else spec for name, spec in specs.items()}

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=_KEPT))

    def _sums(self) -> dict[str, dict[str, str]]:
        try:
            return json.loads(self._sums_path.read_text())
        except (OSError, ValueError):  # then no checkpoint can be trusted, and `latest` says so
            return {}

    def _remove(self, step: int) -> None:
        """Whatever is there of a step, finished or not."""
        with contextlib.suppress(Exception):  # it reports the failed write once more
            self._manager.close()
        for path in self._folder.glob(f"{step}*"):
            if path.name.split(".")[0] == str(step):
                shutil.rmtree(path, ignore_errors=True)
        self._manager = self._open()


def _sums_of(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of every file, by its path in the folder."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def _difference(expected: dict[str, str] | None, folder: pathlib.Path) -> str | None:
    """What is wrong with a folder; None where every file is as it should be."""
    if expected is None:
        return "it has no checksums"
    found = _sums_of(folder)
    return next((f"file {name}" for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)), None)
