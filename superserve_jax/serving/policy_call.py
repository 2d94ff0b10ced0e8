"""Calls of a user's policy, which may be slow or hang. No jax.

A policy of this package, given by name, is called under the pool's lock. That is fast, and it always returns. A policy object
is called without the lock. So clients and the watchdog can take the lock meanwhile.
"""

import collections
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from superserve_jax import errors, foreign
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.policies import custom
from superserve_jax.serving.flight import Failure
from superserve_jax.serving.futures import Query

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.worker import Worker

_log = logging.getLogger(__name__)

_MAX_KINDS = 100  # types of errors that are counted apart


class OutdatedError(Exception):
    """The worker may take no batch with the decision that it asked for."""


class PolicyCall:
    """The call of a user's policy that is under way. There is one at a time, and other workers find no work until it ends.

    Methods named `locked_...` expect the caller to hold the pool's lock.

    Attributes:
      thread: the thread that is in the policy; None if there is none. An abandoned thread no longer counts.
    """

    def __init__(self, pool: "Pool"):
        self._pool, self._trusted = pool, isinstance(pool.options.policy, str)
        self.thread: threading.Thread | None = None
        self._next: threading.Thread | None = None  # it gets the policy after this call, before any worker
        self._since_s = 0.0
        self._failures = collections.Counter[str]()  # by type of error

    def is_here(self) -> bool:
        """Whether the calling thread is in the policy."""
        return self.thread is not None and self.thread is threading.current_thread()

    def ran_s(self, now_s: float) -> float:
        """How long the call has taken so far."""
        return now_s - self._since_s

    def is_overdue(self, now_s: float) -> bool:
        """Whether the call has taken longer than `stall_s`."""
        return self.thread is not None and self.ran_s(now_s) > self._pool.options.stall_s

    def locked_asker(self, worker: "Worker") -> Callable[..., Any]:
        """A function like `dispatch.decide`, for one decision of a worker."""
        decide = dispatch.decide if self._trusted else functools.partial(self._locked_ask, worker)
        return worker.blame.asker(decide) if worker.blame.out else decide

    def _locked_ask(self, worker: "Worker", *question: Any) -> Any:
        """Like `dispatch.decide`, but without the lock.

        Raises OutdatedError, even if the policy raises, if the worker was abandoned, removed or swapped meanwhile.
        """
        self._locked_begin(threading.current_thread())
        self._pool.lock.release()
        try:
            return dispatch.decide(*question)
        finally:
            self._pool.lock.acquire()
            worker.underway.excuse(self.ran_s(self._pool.clock()))
            self._locked_end()
            if not worker.alive or worker.successor is not None:
                raise OutdatedError

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no thread is in the policy, and lets this thread call it. Only one thread at a time uses this.

        The call under way hands over to this thread. Otherwise, if the policy is slow, a worker would always be faster.

        Raises ServerClosedError or WorkersLostError if the server takes no more queries meanwhile.
        """
        try:
            with self._pool.lock:
                if self.thread is None:
                    self._locked_begin(threading.current_thread())
                else:
                    self._next = threading.current_thread()
                    self._pool.changed.wait_for(lambda: self._next is None or self._pool.closing)
                    self._pool.locked_check_serving("cannot be swapped")
            yield
        finally:
            with self._pool.lock:
                self._next = None
                self._locked_end()

    def failed(self, failed: tuple[BaseException, list[Query]]) -> None:
        """Fails the queries that the policy was asked about, with its error.

        The log gets the first error of each type, with its traceback. Then it gets the 10th, the 100th and so on, in one line.
        """
        error, unlucky = failed
        is_decision = isinstance(error, errors.PolicyError)  # else e.g. a KeyboardInterrupt of the policy
        failure = Failure.of((error.__cause__ if is_decision else None) or error)
        text = str(error) if is_decision else f"the policy '{self._name()}' failed: {failure.text}; fix it"
        kind = type(failure.error).__name__ if len(self._failures) < _MAX_KINDS else "other"
        with self._pool.lock:
            self._failures[kind] += 1
            count = self._failures[kind]
        if count == 1:
            foreign.log(_log, logging.ERROR, "%s", text, error=failure.error)
        elif str(count).strip("0") == "1":
            foreign.log(_log, logging.ERROR, "for the %dth time: %s", count, text)
        foreign.forget_frames(error)
        with self._pool.lock:
            self._pool.members.note(failure)
            for query in unlucky:
                self._pool.outbox.fail(query, failure.cause(errors.PolicyError(text)))

    def _name(self) -> str:
        policy = self._pool.options.policy
        return policy if isinstance(policy, str) else custom.name_and_place(policy)[0]

    def locked_excuse(self, seconds: float) -> None:
        """Does not count a time in which the whole process stood still."""
        self._since_s += seconds

    def locked_forget(self) -> None:
        """Gives up the call, which is overdue. Other threads may call the policy now."""
        self._locked_pass_on()
        self._pool.locked_notify_all()

    def _locked_begin(self, thread: threading.Thread) -> None:
        self.thread, self._since_s = thread, self._pool.clock()

    def _locked_pass_on(self) -> None:
        self.thread = None
        if self._next is not None and not self._pool.closing:
            self._locked_begin(self._next)
            self._next = None

    def _locked_end(self) -> None:
        if not self.is_here():
            return  # forgotten
        self._locked_pass_on()
        if self._pool.closing or self._pool.backlog.retries.groups:  # workers may leave, or one of them may run a retry
            self._pool.idle.wake_all()
        self._pool.locked_wake_one()
        self._pool.changed.notify_all()
