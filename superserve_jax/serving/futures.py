"""What a client holds while its query waits, and what it gets: `Future` and `Reply`. No jax.

A future of the standard library costs three times as much, since each makes a condition at birth. Here those that are
submitted together share a lock, and the list of who wants to know is made by the first who does.
"""

import asyncio
import concurrent.futures
import logging
import operator
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from superserve_jax.subnet import Subnet

_log = logging.getLogger(__name__)

_PENDING, _RESULT, _ERROR, _CANCELLED = range(4)


class Reply(NamedTuple):
    """The answer to one query. A named tuple: a frozen dataclass would take a microsecond to make.

    Args:
      output: what the engine returned for this input.
      subnet: the subnet that computed it.
      accuracy: that subnet's profiled accuracy, a fraction of 1.
      met_slo: whether it was ready by the deadline.
      latency_ms: from submit until the output was ready: queue_ms + compute_ms.
      queue_ms: from submit until its batch started.
      compute_ms: how long its batch ran.
      batch: number of queries in its batch.
    """

    output: Any
    subnet: Subnet
    accuracy: float
    met_slo: bool
    latency_ms: float
    queue_ms: float
    compute_ms: float
    batch: int


class Future:
    """The result of a query, some time. Any thread may call any method; it can also be awaited in any asyncio loop.

    It resolves once, to a result, an error or as cancelled; whoever comes later is turned away.

    Args:
      lock: held for a few instructions, so that many futures may share it; None makes one. It is reentrant, since a finalizer
        or a signal handler may come in between at any moment and cancel another of them.

    >>> future = Future()
    >>> future.add_done_callback(lambda f: print("done:", f.result()))
    >>> future.set_result(3), future.set_result(4)
    done: 3
    (True, False)
    >>> future.result(timeout=1)
    3
    """

    __slots__ = ("_callbacks", "_lock", "_state", "_value")

    def __init__(self, lock: "threading.RLock | None" = None):
        self._lock = threading.RLock() if lock is None else lock
        self._state = _PENDING
        self._value: Any = None
        self._callbacks: list[Callable[[Any], object]] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {('pending', 'answered', 'failed', 'cancelled')[self._state]}>"

    def done(self) -> bool:
        """Whether it has resolved."""
        return self._state != _PENDING

    def cancelled(self) -> bool:
        """Whether it resolved by `cancel`."""
        return self._state == _CANCELLED

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result and returns it, or raises the error that stands in its place.

        Args:
          timeout: seconds to wait at most; None waits until it resolves.

        Raises:
          TimeoutError: not resolved in time (it still will be). concurrent.futures.CancelledError: it was cancelled.
        """
        error = self.exception(timeout)
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del error  # else the traceback that it now holds would refer back to it through this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits like `result`, and returns the error, or None where there is a result. Raises what waiting raises."""
        if self._state == _PENDING:
            self._wait(timeout)
        if self._state == _CANCELLED:
            raise concurrent.futures.CancelledError("the query was cancelled by its client")
        return self._value if self._state == _ERROR else None

    def cancel(self) -> bool:
        """Withdraws the query; an answer that is under way is dropped. False where it has been answered already."""
        return self._resolve(_CANCELLED, None) or self.cancelled()

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Calls `fn(future)` once it has resolved: at once if it has, else in the thread that resolves it.

        That thread is as a rule one of the server's workers, whose device a slow callback keeps waiting; it may also be the
        server's watchdog, or whoever cancels, closes or swaps. What it raises is logged.
        """
        with self._lock:
            if self._state == _PENDING:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(fn)
                return
        self._call(fn)

    def __await__(self) -> Generator[Any, None, Any]:
        """Waits without blocking the loop. Cancelling the task that awaits cancels the query, as with asyncio's futures."""
        if self._state == _PENDING:
            mailbox = _mailbox(asyncio.get_running_loop())
            resolved = mailbox.loop.create_future()
            self.add_done_callback(lambda _: mailbox.put(resolved))
            try:
                yield from resolved
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self.result()

    # -- the server's side --------------------------------------------------------------------------------------------------

    def set_result(self, value: Any) -> bool:
        """Resolves to a result. False, and no effect, where it has resolved before."""
        with self._lock:  # as `_resolve` does; a call less, for every query
            if self._state != _PENDING:
                return False
            self._value = value
            self._state = _RESULT
        if self._callbacks is not None:
            self._call_all()
        return True

    def set_exception(self, error: BaseException) -> bool:
        """Resolves to an error. False, and no effect, where it has resolved before."""
        return self._resolve(_ERROR, error)

    def _resolve(self, state: int, value: Any) -> bool:
        with self._lock:
            if self._state != _PENDING:
                return False
            self._value = value
            self._state = state  # last: a reader without the lock looks at the state first
        if self._callbacks is not None:
            self._call_all()
        return True

    def _call_all(self) -> None:
        # Nobody registers any more, so the list can be read without the lock.
        callbacks, self._callbacks = self._callbacks or (), None
        for fn in callbacks:
            self._call(fn)

    def _wait(self, timeout: float | None) -> None:
        gate = threading.Lock()  # shut until the query is answered; an event would wake up no sooner, and costs 3 us more
        gate.acquire()

        def wake(_: Any) -> None:
            gate.release()

        with self._lock:
            if self._state != _PENDING:
                return
            self._callbacks = [wake, *(self._callbacks or ())]  # first, since the others may be slow
        if not gate.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            with self._lock:
                if self._state == _PENDING and self._callbacks is not None:
                    self._callbacks.remove(wake)  # else they would pile up with whoever asks again and again
            raise TimeoutError(f"no answer within {timeout} s; wait longer, or cancel() the query")

    def _call(self, fn: Callable[[Any], object]) -> None:
        try:
            fn(self)
        except KeyboardInterrupt:  # meant for the main thread, which resolves or registers here
            raise
        except BaseException:
            _log.exception("a done-callback of %r raised", self)


resolved = operator.attrgetter("_state")
"""`resolved(future)` is true where the future is `done`; looking at a whole batch takes a third of the time this way."""


class _Mailbox:
    """Wakes those who await in one event loop. To wake a loop from another thread is a system call, and costs more than all
    else that a query costs, so there is one for all queries that resolve before the loop has had time to look."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._lock = threading.Lock()
        self._resolved: list[asyncio.Future[None]] = []

    def put(self, resolved: "asyncio.Future[None]") -> None:
        """Has the loop resolve a future of its own. May be called in any thread."""
        with self._lock:
            self._resolved.append(resolved)
            first = len(self._resolved) == 1
        if first:
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                _log.debug("a query was answered after the event loop that awaited it had closed")

    def _deliver(self) -> None:
        with self._lock:
            delivered, self._resolved = self._resolved, []
        for resolved in delivered:
            if not resolved.done():
                resolved.set_result(None)


_in_thread = threading.local()  # a thread runs one event loop at a time


def _mailbox(loop: asyncio.AbstractEventLoop) -> _Mailbox:
    """The mailbox of the loop that runs in this thread."""
    mailbox = getattr(_in_thread, "mailbox", None)
    if mailbox is None or mailbox.loop is not loop:
        mailbox = _in_thread.mailbox = _Mailbox(loop)
    return mailbox


class Query(Future):
    """A future, and what the server needs to know to resolve it."""

    __slots__ = ("deadline_s", "floor", "inputs", "length", "submitted_s")

    def __init__(
        self, inputs: Any, submitted_s: float, deadline_s: float, floor: float, lock: "threading.RLock | None" = None
    ):
        Future.__init__(self, lock)  # a fifth faster than with super()
        self.inputs = inputs
        self.length = 0  # tokens; 0 where inputs have one shape
        self.submitted_s = submitted_s
        self.deadline_s = deadline_s
        self.floor = floor
