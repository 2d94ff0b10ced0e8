"""Ends a policy that does not return in the simulator. No jax.

A server abandons the worker whose policy hangs. The simulator runs in one thread, so an alarm signal interrupts the policy
instead. That works in the main thread of a process on Linux and macOS, if nobody else uses the signal. It costs one attribute
per decision. Elsewhere, and under a debugger, a policy may take as long as it wants.
"""

import math
import signal
import sys
import threading
from typing import Any

from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.policies import Policy, State


class Patience:
    """While open, raises a TimeoutError inside a policy that takes longer than `limit_s` for one decision, at most twice that.

    `dispatch.decide` turns it into a PolicyError, which names the line that was running.

    Args:
      limit_s: the limit in seconds; infinite for none.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._asked: State | None = None  # the question that the policy is thinking about
        self._before: State | None = None  # the same at the last alarm
        self._armed = False

    def decide(self, policy: Policy, profile: Profile, state: State) -> tuple[Row, int, float, str]:
        """See `dispatch.decide`."""
        self._asked = state
        try:
            return dispatch.decide(policy, profile, state)
        finally:
            self._asked = None

    def __enter__(self) -> "Patience":
        is_possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if self._limit_s < math.inf and is_possible and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            self._armed = True
            signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, self._limit_s, self._limit_s)
        return self

    def __exit__(self, *_: object) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _look(self, *_: Any) -> None:
        asked, before = self._asked, self._before
        self._before = asked
        if asked is not None and asked is before and sys.gettrace() is None:
            raise TimeoutError(f"no decision after {self._limit_s:g} s")
