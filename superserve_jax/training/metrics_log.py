"""Training metrics on disk: JSON lines, and the same values for TensorBoard."""

import json
import logging
import os
import pathlib
import platform
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from superserve_jax import errors, files

# The module makes its classes when it is imported, so type checkers do not see them.
Event: Any = getattr(event_pb2, "Event")  # noqa: B009
SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009

_log = logging.getLogger(__name__)

Send = Callable[[str, int, Mapping[str, float]], None]

_FILES = {"train": "metrics.jsonl", "validation": "validation.jsonl"}


class MetricsLog:
    """Appends to metrics.jsonl (means since the last line), validation.jsonl and tensorboard/ in a run's folder.

    It first drops the lines of steps after `start`, because training repeats these steps. No file stays open.

    Args:
      workdir: the run's folder.
      start: number of steps done.
      send: gets the same values, as (kind, step, values by name).

    Attributes:
      note: the last loss and accuracy as a short text.
    """

    def __init__(self, workdir: pathlib.Path, start: int, *, send: Send = lambda kind, step, values: None):
        for name in _FILES.values():
            lines, damaged = _parse(workdir / name)
            if damaged:
                _log.warning("%s is damaged (%s)", workdir / name, damaged)
                files.set_aside(workdir / name, workdir / "set_aside")
            kept = (json.dumps(line) + "\n" for line in lines if line["step"] <= start)
            files.write_bytes(workdir / name, "".join(kept).encode())
        self._workdir = workdir
        self._send = send
        self._board = workdir / "tensorboard" / f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self._first_events = (Event(file_version="brain.Event:2"),)
        if start:  # TensorBoard hides the values that an interrupted process wrote for later steps
            self._first_events += (Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)),)
        self._pending: list[Mapping[str, Any]] = []
        self._since_s = time.monotonic()
        self.note = ""

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
        self._send(kind, step, values)
        events = [Event(step=step, summary=summary.scalar(f"{kind}/{name}", value)) for name, value in values.items()]
        try:
            files.append(self._workdir / _FILES[kind], (json.dumps({"step": step, **values}) + "\n").encode())
            self._board.parent.mkdir(exist_ok=True)
            files.append(self._board, b"".join(map(_record, (*self._first_events, *events))))
            self._first_events = ()
        except OSError as e:
            _log.warning("the metrics of step %d could not be written: %s. Training goes on", step, e)


def _record(event: Any) -> bytes:
    """An event as a record of TensorBoard's files (TFRecord): length, its checksum, the event, its checksum.

    We do not use tensorboardX's SummaryWriter. Its thread ends at the first error, and later calls then wait for ever.
    """
    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), content, struct.pack("<I", masked_crc32c(content))))


def read(workdir: pathlib.Path, kind: str = "train") -> list[dict[str, float]]:
    """The lines of a kind, "train" or "validation", as dicts. Damaged lines are left out, with a warning.

    A last line that a kill left incomplete is skipped.
    """
    lines, damaged = _parse(workdir / _FILES[kind])
    if damaged:
        _log.warning("%s is damaged (%s); the lines that can be read are used", workdir / _FILES[kind], damaged)
    return lines


def _parse(path: pathlib.Path) -> tuple[list[dict[str, float]], str]:
    """The lines of a file that are metrics, and what is wrong with the file, "" if nothing is."""
    try:
        *whole, last = files.read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return [], ""
    except OSError as e:
        return [], str(e)
    lines, damaged = [], ""
    for i, line in enumerate([*whole, last] if last.endswith(b"}") else whole):
        try:
            values = msgspec.convert(json.loads(line), dict[str, float])
            lines.append({**values, "step": int(values["step"])})
        except errors.MALFORMED as e:
            damaged = damaged or f"line {i + 1}: {type(e).__name__}: {e}"
    return lines, damaged
