"""What a server may leave behind in its process: threads, file descriptors, settings and memory. No jax."""

import dataclasses
import gc
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import psutil

_PERIOD_S = 0.05
_DESCRIPTORS = pathlib.Path("/proc/self/fd")  # Linux


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """What must be the same before and after a server.

    Args:
      threads: the live threads that Python code started.
      native_threads: how many threads the system counts. Some belong to other libraries.
      descriptors: what each file descriptor is open for.
      settings: settings of the interpreter, by name.
    """

    threads: frozenset[threading.Thread]
    native_threads: int
    descriptors: dict[str, str]
    settings: dict[str, Any]

    @classmethod
    def now(cls) -> "ProcessState":
        """The present state. Collects garbage first."""
        gc.collect()
        settings = {
            "switch interval": sys.getswitchinterval(),
            "garbage collection": (gc.isenabled(), gc.get_threshold()),
            "frozen objects": gc.get_freeze_count() > 0,
            "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
            "log handlers": [*logging.getLogger("superserve_jax").handlers],
            "hooks": (sys.unraisablehook, threading.excepthook, sys.gettrace(), threading.gettrace()),
        }
        # Python gives a thread of another library the name Dummy-1 when it runs a finalizer.
        threads = frozenset(thread for thread in threading.enumerate() if not thread.name.startswith("Dummy-"))
        return cls(threads, psutil.Process().num_threads(), _descriptors(), settings)

    def left_by(self, after: "ProcessState") -> list[str]:
        """What is left in the state `after`, in words.

        >>> before = ProcessState.now()
        >>> before.left_by(before)
        []
        >>> thread = threading.Timer(60, print)
        >>> thread.name = "mine"
        >>> thread.start()
        >>> after = ProcessState.now()
        >>> thread.cancel()
        >>> "thread mine" in before.left_by(after)
        True
        >>> before.left_by(dataclasses.replace(before, native_threads=before.native_threads + 1))
        ['1 more threads of the system']
        """
        left = [f"thread {thread.name}" for thread in after.threads - self.threads]
        if after.native_threads > self.native_threads:
            left.append(f"{after.native_threads - self.native_threads} more threads of the system")
        opened = after.descriptors.items() - self.descriptors.items()
        left += [f"file descriptor {number} of {target}" for number, target in sorted(opened)]
        for name, value in self.settings.items():
            if after.settings[name] != value:
                left.append(f"{name} of {after.settings[name]} instead of {value}")
        return left

    def wait_for_leftovers(self, timeout_s: float) -> list[str]:
        """What is still left after `timeout_s`. Returns at once when nothing is."""
        end_s = time.monotonic() + timeout_s
        while left := self.left_by(ProcessState.now()):
            if time.monotonic() > end_s:
                return left
            time.sleep(_PERIOD_S)
        return []


def _descriptors() -> dict[str, str]:
    found = {}
    for path in _DESCRIPTORS.iterdir() if _DESCRIPTORS.exists() else ():
        try:
            found[path.name] = os.readlink(path)
        except OSError:  # the descriptor with which this folder was listed
            continue
    return found
