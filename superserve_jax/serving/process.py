"""What ties a server to its process: the runtime's settings, the interpreter's exit, and forks. No jax."""

import atexit
import contextlib
import os
from collections.abc import Callable

from superserve_jax import errors
from superserve_jax.serving import runtime


class ProcessTies:
    """Holds until `release`.

    Args:
      at_exit: called before the interpreter exits. A daemon thread that runs while the interpreter is taken down can crash it.
      tune_runtime: whether `runtime.low_latency` is active meanwhile.
    """

    def __init__(self, at_exit: Callable[[], object], *, tune_runtime: bool):
        self._pid, self._at_exit = os.getpid(), at_exit
        self._runtime = contextlib.ExitStack()
        if tune_runtime:
            self._runtime.enter_context(runtime.low_latency())
        atexit.register(self._exit)

    def is_fork(self) -> bool:
        """Whether this process is a fork. It has the server's memory but none of its threads, and may never get its locks."""
        return os.getpid() != self._pid

    def refuse_fork(self) -> None:
        """Raises ServerClosedError in a fork."""
        if os.getpid() != self._pid:
            raise errors.ServerClosedError(
                f"the server belongs to process {self._pid}, this is its fork {os.getpid()}, which has none of its threads; "
                "open the server after forking, or submit in the process that opened it"
            )

    def release(self) -> None:
        """Puts the process back as it was."""
        self._runtime.close()
        atexit.unregister(self._exit)

    def _exit(self) -> None:
        if not self.is_fork():
            self._at_exit()
