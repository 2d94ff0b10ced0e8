"""Training metrics on disk: JSON lines, and the same values for TensorBoard."""

import json
import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX

from superserve_jax import files

_log = logging.getLogger(__name__)

_FILES = {"train": "metrics.jsonl", "validation": "validation.jsonl"}


class MetricsLog:
    """Appends to metrics.jsonl (means since the last line), validation.jsonl and tensorboard/ in a run's folder.

    It first drops the lines of steps after `start`, because training repeats these steps. Use it as a context manager.

    Args:
      workdir: the run's folder.
      start: number of steps done.

    Attributes:
      note: the last loss and accuracy as a short text.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        for kind, name in _FILES.items():
            kept = (json.dumps(line) + "\n" for line in read(workdir, kind) if line["step"] <= start)
            files.write_bytes(workdir / name, "".join(kept).encode())
        self._workdir = workdir
        # With `purge_step`, TensorBoard hides the values that an interrupted process wrote for later steps.
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else None)
        self._pending: list[Mapping[str, Any]] = []
        self._since_s = time.monotonic()
        self.note = ""

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._board.close()

    def add(self, scalars: Mapping[str, Any]) -> None:
        """Adds the scalars of a step. It does not wait for arrays that are still being computed."""
        self._pending.append(scalars)

    def flush(self, step: int, *, examples: int) -> None:
        """Writes the means since the last flush. `examples` is the number of examples in a step."""
        names = dict.fromkeys(k for s in self._pending for k in s)  # a phase in which nothing is elastic has no loss_smallest
        means = {k: float(np.mean([float(s[k]) for s in self._pending if k in s])) for k in names}
        now_s = time.monotonic()
        rate = examples * len(self._pending) / (now_s - self._since_s)
        self._write("train", step, {**means, "examples_per_s": rate})
        self.note = f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.3f}"
        self._pending, self._since_s = [], now_s

    def validation(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Writes validation accuracies by the name of the subnet."""
        self._write("validation", step, accuracies)
        self._since_s = time.monotonic()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        try:
            with (self._workdir / _FILES[kind]).open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as e:
            _log.warning("the metrics of step %d could not be written: %s. Training goes on", step, e)


def read(workdir: pathlib.Path, kind: str = "train") -> list[dict[str, float]]:
    """The lines of a kind, "train" or "validation", as dicts. A last line that a kill left incomplete is skipped."""
    path = workdir / _FILES[kind]
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
