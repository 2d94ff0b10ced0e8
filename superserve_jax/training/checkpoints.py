"""A run's checkpoints: Orbax, with a SHA-256 of every file.

The checksums are our own because Orbax does not detect corruption: it restores many flipped bits without an error. The
checksums of a step are in checksums/STEP.json, which is written after the checkpoint. A checkpoint that a kill, a full disk
or a bad sector has damaged does not match its checksums. Training then uses the checkpoint before it.
"""

import contextlib
import gc
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from superserve_jax import errors, files

_log = logging.getLogger(__name__)

_KEPT = 2
_MOST_BYTES = 1 << 28  # of a file of checksums


class Checkpoints:
    """The checkpoints in a run's folder; a context manager.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._sums = self._folder.with_name("checksums")
        for path in (self._folder, self._sums):
            if path.exists() and not path.is_dir():
                raise errors.DataError(f"{path} is not a folder, so it cannot hold checkpoints; remove it")
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def latest(self, *, clean: bool = False) -> int | None:
        """The last step with an undamaged checkpoint, or None. Logs a warning for each damaged checkpoint after it.

        Args:
          clean: whether to move the damaged checkpoints, and those without checksums, into the folder `set_aside` of the run.
            Their steps can then be saved again, and Orbax cannot delete them. Only for the training process.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            problem = self.damage(step)
            if problem is None:
                if clean:
                    self._set_aside([other for other in steps[i + 1 :] if not self._sums_path(other).exists()])
                return step
            what_now = "the one before it is used" if i + 1 < len(steps) else "there is none before it"
            _log.warning("the checkpoint of step %d in %s is damaged (%s); %s", step, self._folder, problem, what_now)
            if clean:
                self._set_aside([step])
        return None

    def damage(self, step: int) -> str | None:
        """What is wrong with the checkpoint of a step, such as "file ema/manifest.ocdbt"; None if its checksums match."""
        try:
            expected = json.loads(files.read_bytes(self._sums_path(step), most=_MOST_BYTES))
            found = self._sums_of(step)
            return next(
                (f"file {name}" for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)), None
            )
        except (OSError, *errors.MALFORMED) as e:
            return f"its checksums cannot be read: {e}"

    def save(self, step: int, **items: Any) -> None:
        """Writes pytrees, such as `params` and `opt_state`, and returns when they are on disk.

        Raises:
          DataError: the pytrees cannot be written. Earlier checkpoints are not changed.
        """
        if (self._folder / str(step)).exists():
            raise errors.DataError(f"{self._folder / str(step)} exists already; another program writes checkpoints there")
        args = {name: ocp.args.StandardSave(item) for name, item in items.items() if jax.tree.leaves(item)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
            self._manager.wait_until_finished()
            files.write_json(self._sums_path(step), self._sums_of(step))
            for path in self._sums.glob("*.json"):
                if not (self._folder / path.stem).exists():
                    path.unlink()
            return
        except Exception as e:  # Orbax passes on whatever its storage layer raises
            problem = repr(e)
        # The exception keeps Orbax' unfinished writes alive, and these would log errors when the interpreter ends. So clean up
        # only after the handler has dropped it.
        self._remove(step)
        gc.collect()
        raise errors.DataError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {problem}; make room on the disk"
        )

    def restore(self, step: int, **specs: Any) -> Any:
        """The named pytrees of a checkpoint, on the first device. A spec has the shapes and dtypes of a pytree.

        Raises:
          DataError: the checkpoint is of another network or optimiser.
        """
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), specs)
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items() if jax.tree.leaves(target)}
        if differences := self._differences(step, specs):
            more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
            raise errors.DataError(
                f"the checkpoint of step {step} in {self._folder} is of another network or optimiser: "
                f"{'; '.join(differences[:3])}{more}. Restore the run's own folders checkpoints and checksums, or remove both "
                f"to train anew"
            )
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] if name in items else spec for name, spec in specs.items()}

    def _differences(self, step: int, specs: Mapping[str, Any]) -> list[str]:
        """Where the arrays of a checkpoint differ from the expected ones."""
        read_metadata: Any = ocp.StandardCheckpointHandler().metadata
        result = []
        for name, spec in specs.items():
            folder, expected = self._folder / str(step) / name, _shapes(spec)
            found = _shapes(read_metadata(folder)) if folder.is_dir() else {}
            for key, shape in {**found, **expected}.items():
                if key not in expected or key not in found:
                    result.append(f"{name}/{key} of shape {shape} is {'missing' if key in expected else 'not expected'}")
                elif found[key] != shape:
                    result.append(f"{name}/{key} has shape {found[key]} instead of {shape}")
        return result

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=_KEPT))

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves checkpoints out of Orbax' reach. They may be somebody else's, or a user may want to look at them."""
        if not steps:
            return
        self._manager.close()
        for step in steps:
            for path in (self._folder / str(step), self._sums_path(step)):
                if path.exists():
                    files.set_aside(path, self._folder.with_name("set_aside"))
        self._manager = self._open()

    def _remove(self, step: int) -> None:
        """Removes what `save` wrote of a step, finished or not."""
        with contextlib.suppress(Exception):  # closing raises the error of the failed write once more
            self._manager.close()
        # Orbax raises the first error while its other threads still write.
        files.remove_trees(lambda: [path for path in self._folder.glob(f"{step}*") if path.name.split(".")[0] == str(step)])
        self._sums_path(step).unlink(missing_ok=True)
        self._manager = self._open()

    def _sums_path(self, step: int) -> pathlib.Path:
        return self._sums / f"{step}.json"

    def _sums_of(self, step: int) -> dict[str, str]:
        """The SHA-256 of every file of a step, by its path in the checkpoint."""
        folder = self._folder / str(step)
        return {str(p.relative_to(folder)): files.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf, by a path such as "1/0/mu/classifier.bias"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
