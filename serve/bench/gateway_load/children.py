"""Servers in processes of their own: starts and ends them, and counts the CPU time of all programs of the machine."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import psutil

from superserve_jax import errors

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
_START_S, _END_S, _POLL_S = 120.0, 30.0, 0.02


@dataclasses.dataclass(frozen=True)
class Child:
    """A server in a process of its own.

    Args:
      process: the process.
      out: a file with what it has printed.
      err: a file with what it has printed on stderr.
    """

    process: subprocess.Popen
    out: IO[str]
    err: IO[str]

    def text(self) -> str:
        """What the process has printed."""
        return _text(self.out)

    def printed(self) -> dict[str, Any]:
        """The last line of JSON that the process has printed; {} without one."""
        lines = [line for line in self.text().splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")]
        return json.loads(lines[-1]) if lines else {}

    def said(self) -> str:
        """What the process has printed on stderr."""
        return _text(self.err)

    def processes(self) -> list[psutil.Process]:
        """The process, and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def memory_mb(self) -> float:
        """The memory that the process has now, in MB."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def end(self, number: int = signal.SIGTERM, timeout_s: float = _END_S) -> int | None:
        """Sends a signal and waits. Returns the exit status, or None if the process has not ended in time."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        return self.process.returncode


@contextlib.contextmanager
def started(
    script: str,
    *arguments: Any,
    python: pathlib.Path | str = sys.executable,
    environment: Mapping[str, str] | None = None,
    ready: Callable[[Child], object] = Child.printed,
    start_s: float = _START_S,
) -> Iterator[Child]:
    """Runs a script of this folder until the end of the block.

    Args:
      script: the name of a file in this folder.
      arguments: of the command line.
      python: the interpreter.
      environment: more variables of the environment.
      ready: whether the server is ready, as a true value. By default it is when it has printed a line of JSON.
      start_s: how many seconds it may take to be ready.

    Raises ConfigError if the script ends, or is not ready in time.
    """
    path = os.pathsep.join(p for p in (str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")) if p)
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    command = [str(python), str(HERE / script), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=err, start_new_session=True)
        child, ends_s = Child(process, out, err), time.monotonic() + start_s
        try:
            while not ready(child):
                if process.poll() is not None or time.monotonic() > ends_s:
                    last = child.said().strip().splitlines()[-1:] or ["it printed nothing"]
                    raise errors.ConfigError(f"{script} did not start, status {process.poll()}: {last[0]}")
                time.sleep(_POLL_S)
            yield child
        finally:
            child.end()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes that it has left; the session is its own
            process.wait()


def _text(file: IO[str]) -> str:
    """What a process has written to a file. The position stays at the end, since both processes share it."""
    return os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class CpuTimes:
    """CPU time so far in seconds, and the time on the clock.

    Args:
      own: of this process.
      child: of a child with all its processes; 0 without one.
      all: of all programs of the machine.
      clock_s: the time on the clock `time.monotonic`.
    """

    own: float
    child: float
    all: float
    clock_s: float

    @classmethod
    def now(cls, child: Child | None) -> "CpuTimes":
        """The times at present."""
        of_child = sum(map(_cpu_s, child.processes())) if child else 0.0
        return cls(time.process_time(), of_child, sum(map(_cpu_s, psutil.process_iter())), time.monotonic())

    def since(self, before: "CpuTimes", queries: int) -> dict[str, float]:
        """CPU time between two moments: of server and generator in us per query, and the cores that other programs used."""
        own, child, everything = self.own - before.own, self.child - before.child, self.all - before.all
        return {
            "server_us": 1e6 * child / queries,
            "generator_us": 1e6 * own / queries,
            "other_cores": max(everything - own - child, 0.0) / (self.clock_s - before.clock_s),
        }


def _cpu_s(process: psutil.Process) -> float:
    """The CPU time of a process, and of its children that have ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return sum(process.cpu_times()[:4])
    return 0.0
