"""Futures: `Future` and `Query`, which a client holds while its query waits, and `Reply`, the answer. No jax.

One file because a query is its own future.
Our own futures, since a future of the standard library costs three times as much: each one makes a condition. Here the queries
of one submit share a lock, and the list of callbacks is only made with the first callback.
"""

import asyncio
import concurrent.futures
import logging
import numbers
import operator
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from superserve_jax import errors, foreign
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.profile import Row
from superserve_jax.serving import runtime
from superserve_jax.subnet import Subnet

_log = logging.getLogger(__name__)

_SHOWN = 60  # characters of an output that is no array of logits
_PENDING, _RESULT, _ERROR, _CANCELLED = range(4)


def check_timeout(name: str, seconds: Any) -> float | None:
    """A time limit that locks accept, or None for no limit. Raises ConfigError unless it is None or a number of seconds.

    >>> check_timeout("timeout", 2), check_timeout("timeout", -1), check_timeout("timeout", float("inf"))
    (2.0, 0.0, None)
    """
    if seconds is None:
        return None
    if not isinstance(seconds, numbers.Real) or seconds != seconds:
        raise errors.ConfigError(f"{name} must be a number of seconds, or None for no limit; got {foreign.text_of(seconds)}")
    return max(float(seconds), 0.0) if seconds < threading.TIMEOUT_MAX else None


class Reply(NamedTuple):
    """The answer to one query. A named tuple, since a frozen dataclass would take a microsecond to make.

    Args:
      output: the engine's output for this input.
      subnet: the subnet that computed the output.
      accuracy: that subnet's profiled accuracy, a fraction of 1. It is 0 if the export does not know it.
      met_slo: whether the output was ready by the deadline.
      latency_ms: time from submit until the output was ready: queue_ms + compute_ms.
      queue_ms: time from submit until the query's batch started.
      compute_ms: how long the batch ran.
      batch: number of queries in the batch.
      class_names: names of the classes, from the export; empty if unknown.
      compute_dtype: the dtype in which the subnet computed, "float32" or "bfloat16".

    >>> reply = Reply(np.float32([0.1, 0.9]), Subnet((1,)), 0.7, True, 3.0, 1.0, 2.0, 4, ("cat", "dog"))
    >>> reply.label, reply._replace(class_names=()).label
    ('dog', 1)
    >>> reply
    Reply(label='dog', accuracy=0.7, met_slo=True, latency_ms=3, queue_ms=1, compute_ms=2, batch=4)
    """

    output: Any
    subnet: Subnet
    accuracy: float
    met_slo: bool
    latency_ms: float
    queue_ms: float
    compute_ms: float
    batch: int
    class_names: tuple[str, ...] = ()
    compute_dtype: ComputeDtype = "float32"

    @property
    def label(self) -> str | int:
        """The class with the largest logit: its name, or its index if the export names no classes."""
        index = int(np.argmax(self.output))
        return self.class_names[index] if index < len(self.class_names) else index

    def __repr__(self) -> str:
        # An engine of a user may return any object, so only logits have a label here.
        logits = isinstance(self.output, np.ndarray) and self.output.ndim == 1 and self.output.dtype.kind == "f"
        what = f"label={self.label!r}" if logits else f"output={foreign.text_of(self.output)[:_SHOWN]}"
        times = ", ".join(f"{name}={getattr(self, name):.3g}" for name in ("latency_ms", "queue_ms", "compute_ms"))
        return f"Reply({what}, accuracy={self.accuracy:.4g}, met_slo={self.met_slo}, {times}, batch={self.batch})"


class Future:
    """The result of a query that may still wait. Any thread may call any method. Any asyncio loop can await it.

    A future resolves once: to a result, to an error, or as cancelled. Later attempts have no effect.

    Args:
      lock: a lock that is held for a few instructions, so many futures may share it. None makes one. It is reentrant, since a
        finalizer or a signal handler may interrupt at any moment and cancel another future.

    >>> future = Future()
    >>> future.add_done_callback(lambda f: print("done:", f.result()))
    >>> future.set_result(3), future.set_result(4)
    done: 3
    (True, False)
    >>> future.result(timeout=1)
    3
    """

    __slots__ = ("_callbacks", "_lock", "_process_id", "_state", "_value")

    def __init__(self, lock: "threading.RLock | None" = None):
        self._process_id = runtime.process_id
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
        """Waits for the result and returns it, or raises the error.

        Args:
          timeout: the longest time to wait, in seconds. None waits until it resolves.

        Raises:
          TimeoutError: the future has not resolved in time; it may still. concurrent.futures.CancelledError: it was cancelled.
          ServerClosedError: among others, the future had not resolved when this process was forked.
        """
        error = self.exception(timeout)
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del error  # avoids a reference cycle: error -> traceback -> this frame -> error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits and returns the error, or None if there is a result. Timeout and cancellation raise as in `result`."""
        if self._state == _PENDING:
            self._wait(timeout)
        if self._state == _CANCELLED:
            raise concurrent.futures.CancelledError("the query was cancelled by its client")
        return self._value if self._state == _ERROR else None

    def cancel(self) -> bool:
        """Cancels the query; a later answer is dropped. Returns False if it has been answered already."""
        return self._resolve(_CANCELLED, None) or self.cancelled()

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Calls `fn(future)` when the future has resolved: at once if it has already, else in the thread that resolves it.

        Usually that is a worker's thread, and a slow callback keeps its device waiting. It may also be the watchdog's thread,
        or a thread that cancels, submits, closes, swaps or removes. An error that `fn` raises is logged.
        """
        if self._state == _PENDING:
            self._refuse_fork()
        callbacks = [fn]
        # No call and no new object under the lock. Either could run a signal handler or a finalizer that closes the server,
        # and then waits for a worker that waits for this lock.
        with self._lock:
            if self._state == _PENDING:
                if self._callbacks is None:
                    self._callbacks = callbacks
                else:
                    self._callbacks += callbacks
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
        """Resolves to a result. Returns False, without effect, if it has resolved before."""
        with self._lock:  # a copy of `_resolve`, which saves a call per query
            if self._state != _PENDING:
                return False
            self._value = value
            self._state = _RESULT
        if self._callbacks is not None:
            self._call_all()
        return True

    def set_exception(self, error: BaseException) -> bool:
        """Resolves to an error. Returns False, without effect, if it has resolved before."""
        return self._resolve(_ERROR, error)

    def _resolve(self, state: int, value: Any) -> bool:
        with self._lock:
            if self._state != _PENDING:
                return False
            self._value = value
            self._state = state  # last, since readers without the lock look at the state first
        if self._callbacks is not None:
            self._call_all()
        return True

    def _call_all(self) -> None:
        # Nobody registers any more, so the list can be read without the lock.
        callbacks, self._callbacks = self._callbacks or (), None
        interrupt = None
        for fn in callbacks:
            try:
                self._call(fn)
            except KeyboardInterrupt as error:  # the callbacks behind it must be called, too
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _refuse_fork(self) -> None:
        """Raises ServerClosedError if the future belongs to another process. Its lock may be held forever in this one."""
        if self._process_id != runtime.process_id:
            raise errors.ServerClosedError(
                f"the query was submitted by process {self._process_id}, and only that process gets the answer, "
                f"not its fork {runtime.process_id}; submit in the process that waits, to a server that it has opened"
            )

    def _wait(self, timeout: float | None) -> None:
        self._refuse_fork()
        gate = threading.Lock()  # locked until the query is answered; an Event would cost 3 us more
        gate.acquire()

        def wake(_: Any) -> None:
            gate.release()

        limit_s = check_timeout("timeout", timeout)
        callbacks: list[Callable[[Any], object]] = [wake]
        with self._lock:  # see `add_done_callback`
            if self._state != _PENDING:
                return
            callbacks += self._callbacks or ()  # `wake` is the first, since the others may be slow
            self._callbacks = callbacks
        if not gate.acquire(timeout=-1 if limit_s is None else limit_s):
            with self._lock:
                if self._state == _PENDING and self._callbacks is not None:
                    self._callbacks.remove(wake)  # or repeated timeouts would fill the list
            raise TimeoutError(f"no answer within {timeout} s; wait longer, or cancel() the query")

    def _call(self, fn: Callable[[Any], object]) -> None:
        try:
            fn(self)
        except BaseException as error:
            if foreign.is_interrupt(error):
                raise
            foreign.log(_log, logging.ERROR, "a done-callback of %r raised", self, error=error)


resolved = operator.attrgetter("_state")
"""`resolved(future)` is truthy if `future.done()`, and takes a third of the time."""


class _Mailbox:
    """Wakes the tasks that await queries in one event loop.

    Waking a loop from another thread takes a system call, which costs more than everything else for a query. So one wake-up
    serves all queries that resolve before the loop runs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._lock = threading.RLock()  # a finalizer may cancel another query meanwhile
        self._resolved: list[asyncio.Future[None]] = []

    def put(self, resolved: "asyncio.Future[None]") -> None:
        """Has the loop resolve one of its own futures. Any thread may call it."""
        new = [resolved]
        with self._lock:  # see `Future.add_done_callback`
            first = not self._resolved
            self._resolved += new
        if first:
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                _log.debug("a query was answered after the event loop that awaited it had closed")

    def _deliver(self) -> None:
        none: list[asyncio.Future[None]] = []
        with self._lock:
            delivered, self._resolved = self._resolved, none
        for resolved in delivered:
            if not resolved.done():
                resolved.set_result(None)


_in_thread = threading.local()  # one mailbox per thread, since a thread runs one event loop at a time


def _mailbox(loop: asyncio.AbstractEventLoop) -> _Mailbox:
    """The mailbox of the loop that runs in this thread."""
    mailbox = getattr(_in_thread, "mailbox", None)
    if mailbox is None or mailbox.loop is not loop:
        mailbox = _in_thread.mailbox = _Mailbox(loop)
    return mailbox


class Query(Future):
    """The future of one query, with what the server needs to know about the query.

    Args:
      inputs: the input, an array.
      submitted_s, deadline_s: when the query was submitted, and when its answer is due.
      floor: the lowest accuracy that the client accepts, a fraction of 1.
      lock: see `Future`.

    Attributes:
      length: number of tokens of the input; 0 if all inputs have one shape.
    """

    __slots__ = ("deadline_s", "floor", "inputs", "length", "submitted_s")

    def __init__(
        self, inputs: Any, submitted_s: float, deadline_s: float, floor: float, lock: "threading.RLock | None" = None
    ):
        # A copy of `Future.__init__`, which saves a call per query.
        self._process_id = runtime.process_id
        self._lock = threading.RLock() if lock is None else lock
        self._state = _PENDING
        self._value = self._callbacks = None
        self.inputs = inputs
        self.length = 0
        self.submitted_s = submitted_s
        self.deadline_s = deadline_s
        self.floor = floor


def answer(
    batch: Sequence[Query],
    outputs: Sequence[Any],
    row: Row,
    start_s: float,
    finish_s: float,
    names: tuple[str, ...] = (),
    dtype: ComputeDtype = "float32",
) -> tuple[int, list[Query]]:
    """Resolves the queries of a batch to their replies.

    Args:
      batch: the queries.
      outputs: the output for each query.
      row: the subnet that computed the outputs.
      start_s, finish_s: when the batch started, and when its outputs were ready.
      names: names of the classes.
      dtype: the dtype in which the subnet computed.

    Returns:
      How many replies were late, and the queries that had already resolved, for example because they were cancelled.
    """
    late, turned_away, count, compute_ms = 0, list[Query](), len(batch), 1e3 * (finish_s - start_s)
    subnet, accuracy = row.subnet, row.accuracy
    make = Reply._make  # half the cost of the constructor
    for query, output in zip(batch, outputs, strict=True):
        queue_ms = 1e3 * (start_s - query.submitted_s)
        met_slo = finish_s <= query.deadline_s
        reply = make((output, subnet, accuracy, met_slo, queue_ms + compute_ms, queue_ms, compute_ms, count, names, dtype))
        if not query.set_result(reply):
            turned_away.append(query)
        elif not met_slo:
            late += 1
    return late, turned_away
