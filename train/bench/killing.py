"""Runs a function in a forked child that kills itself with SIGKILL at a planned moment: at a file operation, or at a time.

The child counts its file operations below its current folder, as Python's audit events report them. So a kill can come before
any of them, also before a rename that takes microseconds. The native threads of Orbax write without audit events. A kill at a
time meets these writes.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

# The audit events that change files, and the number of their arguments that are paths. `open` is in the list to read, too:
# between two writes, something may be half done.
_OPERATIONS = {
    "open": 1,
    "os.mkdir": 1,
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.utime": 1,
    "os.link": 2,
    "os.listdir": 1,
    "os.scandir": 1,
    "fcntl.flock": 0,
}
_LIMIT_S = 300  # a child that takes longer hangs

Classify = Callable[[str, str, str], str]
"""Returns the phase of a file operation from the current phase, the operation and its path."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: before file operation number `operation` of a phase, or after `seconds` in it.

    A phase that is entered several times goes on counting.
    """

    phase: str
    operation: int | None = None
    seconds: float | None = None


@dataclasses.dataclass
class Seen:
    """What a child did in a phase: the number of its file operations, and the seconds that it took."""

    operations: int = 0
    seconds: float = 0.0


def by_operation(phase: str, operation: str, path: str) -> str:
    """Splits renames from the other operations of a phase."""
    return f"{phase}: rename" if operation == "os.rename" else phase


class ChildError(Exception):
    """A child failed or hung."""


class Watch:
    """Counts the file operations of this process by phase, and kills the process at a moment. Only for a forked child.

    Args:
      moment: when to kill; None only counts.
      log: a file outside of the current folder. It gets one JSON line when the process is killed.
      classify: see `Classify`.
    """

    def __init__(self, moment: Moment | None, log: pathlib.Path, classify: Classify = by_operation):
        self.phase, self.step = "start", 0
        self._moment, self._classify, self._here = moment, classify, os.getcwd()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._seen: dict[str, Seen] = collections.defaultdict(Seen)
        self._start_s = self._since_s = time.monotonic()
        self._timer: threading.Timer | None = None
        sys.addaudithook(self._on_event)
        self._enter("start")

    def seen(self) -> dict[str, Seen]:
        """What the process did in each phase so far."""
        self._enter(self.phase)
        return dict(self._seen)

    def enter(self, phase: str) -> Any:
        """The phase is `phase` from now on."""
        self._enter(phase)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The phase is `phase` inside the block, and then as before."""
        before = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Calls of `owner.name` are the phase `phase` from now on."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    def _enter(self, phase: str) -> None:
        now_s = time.monotonic()
        self._seen[self.phase].seconds += now_s - self._since_s
        self.phase, self._since_s = phase, now_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moment = self._moment
        if moment is not None and moment.seconds is not None and moment.phase == phase:
            left_s = max(0.0, moment.seconds - self._seen[phase].seconds)
            self._timer = threading.Timer(left_s, self._kill, (phase, "time", ""))
            self._timer.daemon = True
            self._timer.start()

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        count = _OPERATIONS.get(event)
        if count is None:
            return
        paths = [os.path.join(self._here, os.fsdecode(p)) for p in args[:count] if isinstance(p, str | bytes | os.PathLike)]
        if count and not (paths and paths[0].startswith(self._here + os.sep)):
            return
        path = os.path.relpath(paths[-1], self._here) if paths else ""
        phase = self._classify(self.phase, event, path)
        self._seen[phase].operations += 1
        moment = self._moment
        if moment is not None and moment.phase == phase and moment.operation == self._seen[phase].operations:
            self._kill(phase, event, path)

    def _kill(self, phase: str, event: str, path: str) -> None:
        line = {
            "phase": phase,
            "before": event,
            "path": path,
            "step": self.step,
            "after_s": round(time.monotonic() - self._start_s, 4),
        }
        os.write(self._log, (json.dumps(line) + "\n").encode())
        os.kill(os.getpid(), signal.SIGKILL)


def run(function: Callable[[], Any], *, folder: pathlib.Path, output: pathlib.Path) -> Any:
    """Calls a function in a forked child whose current folder is `folder`.

    Fork only before jax has started its backend: a child cannot use the parent's.

    Args:
      function: what to call. Its result must be a JSON value.
      folder: the current folder of the child.
      output: a file that gets what the child prints.

    Returns:
      The result, or None if the child was killed.

    Raises:
      ChildError: the child failed or hung; the message ends with what it printed.
    """
    result = output.with_suffix(".result")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(_LIMIT_S)
            _redirect(output)
            os.chdir(folder)
            result.write_text(json.dumps(function()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status:
        raise ChildError(f"the child in {folder} ended with status {status}:\n{output.read_text()[-3000:]}")
    return json.loads(result.read_text())


class Phases:
    """Random moments. Each phase gets as many of them as the others."""

    def __init__(self, seen: Mapping[str, Seen], rng: random.Random):
        self._seen, self._rng, self._left = seen, rng, []

    def next(self) -> Moment:
        """The next moment."""
        if not self._left:
            self._left = self._rng.sample(sorted(self._seen), len(self._seen))
        return _choose(self._seen, self._rng, self._left.pop())

    def put_back(self, moment: Moment) -> None:
        """Chooses this moment's phase next, since the process ended before the moment came."""
        self._left.append(moment.phase)


def digests(tree: Any) -> dict[str, str]:
    """The SHA-256 of every array in a pytree, with its shape and dtype, by its path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest = hashlib.sha256(repr((array.shape, array.dtype)).encode() + array.tobytes()).hexdigest()
        found[jax.tree_util.keystr(path)] = digest
    return found


def by_text(of_subnets: Mapping[Any, Any]) -> dict[str, Any]:
    """A dict with subnets as keys as a pytree, whose keys must be text."""
    return {json.dumps(subnet.to_json()): value for subnet, value in of_subnets.items()}


def last_line(path: pathlib.Path) -> dict[str, Any]:
    """The last line of a log of `Watch`."""
    return json.loads(path.read_text().splitlines()[-1])


def _choose(seen: Mapping[str, Seen], rng: random.Random, phase: str) -> Moment:
    """A random moment of a phase: before one of its operations, or at a time.

    A phase of renames is over in less time than a timer can meet.
    """
    about = seen[phase]
    if about.operations and (": " in phase or about.seconds < 1e-3 or rng.random() < 0.5):
        return Moment(phase, operation=rng.randint(1, about.operations))
    return Moment(phase, seconds=rng.uniform(0, about.seconds))


def _redirect(output: pathlib.Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
