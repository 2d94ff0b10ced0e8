"""`ProcessTies`: settings of the process while a server is open, and its behaviour at exit and in forks. No jax."""

import atexit
import contextlib
import os
from collections.abc import Callable

from superserve_jax import errors
from superserve_jax.serving import runtime


class ProcessTies:
    """Changes the process's settings for a server, and registers a call at exit. `release` undoes both.

    Args:
      at_exit: called before the interpreter exits. It must end the daemon threads, since one that still runs then can crash
        the interpreter.
      tune_runtime: whether `runtime.low_latency` is active until `release`.
    """

    def __init__(self, at_exit: Callable[[], object], *, tune_runtime: bool):
        self._pid, self._at_exit = os.getpid(), at_exit
        self._runtime = contextlib.ExitStack()
        if tune_runtime:
            self._runtime.enter_context(runtime.low_latency())
        atexit.register(self._exit)

    def is_fork(self) -> bool:
        """Whether this process is a fork. A fork has the server's memory but no threads, and its locks may be held forever."""
        return os.getpid() != self._pid

    def refuse_fork(self) -> None:
        """Raises ServerClosedError in a fork."""
        if os.getpid() != self._pid:
            raise errors.ServerClosedError(
                f"the server belongs to process {self._pid}, this is its fork {os.getpid()}, which has none of its threads; "
                "open the server after forking, or submit in the process that opened it"
            )

    def release(self) -> None:
        """Restores the settings of the process, and unregisters the call at exit."""
        self._runtime.close()
        atexit.unregister(self._exit)

    def _exit(self) -> None:
        if not self.is_fork():
            self._at_exit()
