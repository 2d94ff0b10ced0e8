"""The threads behind `Server`: they pull batches from the one queue, run them, and answer. No jax.

`server.py` opens with the map of threads and locks. Methods named `_locked_...` expect the caller to hold the lock.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.serving import dispatch, drift, engine, futures, padding, policies, queue, runtime
from superserve_jax.subnet import Subnet

_log = logging.getLogger(__name__)


class Query(futures.Future):
    """A future, and what the server needs to know to resolve it."""

    __slots__ = ("deadline_s", "floor", "inputs", "length", "submitted_s", "tries")

    def __init__(
        self, inputs: Any, submitted_s: float, deadline_s: float, floor: float, lock: "threading.RLock | None" = None
    ):
        futures.Future.__init__(self, lock)  # a fifth faster than with super()
        self.inputs = inputs
        self.length = 0  # tokens; 0 where inputs have one shape
        self.submitted_s = submitted_s
        self.deadline_s = deadline_s
        self.floor = floor
        self.tries = 0  # batches that failed with it


@dataclasses.dataclass(slots=True, eq=False)
class Worker:
    """One engine and its thread. `batch` is what it runs at the moment, since `started_s`."""

    engine: engine.Engine
    index: int
    profile: Profile
    thread: threading.Thread = dataclasses.field(init=False)
    batch: Sequence[Query] = ()
    started_s: float = 0.0
    last_subnet: Subnet | None = None
    failures: int = 0  # in a row
    alive: bool = True
    abandoned: bool = False


class Pool:
    """Queue, workers and watchdog of one server. Its threads refer to the pool, never to the `Server`, so that a server
    that nobody holds any more can be collected and then closes."""

    def __init__(
        self,
        engines: Sequence[engine.Engine],
        profiles: Sequence[Profile],
        policy: policies.Policy,
        *,
        max_queue: int,
        expire: bool,
        max_tries: int,
        max_failures: int,
        pause_s: float,
        stall_s: float,
        tune_runtime: bool,
        follow_drift: bool,
        clock: Callable[[], float],
    ):
        self._clock = clock
        self._policy = policy
        self._batch_sizes, self._has_lengths = profiles[0].batch_sizes, bool(profiles[0].shorter)  # as those of all
        self._padded = [profiles[0].batch_index(n) for n in range(profiles[0].max_batch + 1)]
        self._fleet = drift.Fleet(profiles, correct=follow_drift)
        self._max_queue, self._expire = max_queue, expire
        self._max_tries, self._max_failures = max_tries, max_failures
        self._pause_s, self._stall_s = pause_s, stall_s
        self._fastest_s = 1e-3 * min(queue.fastest(p.at_length(0)).latency_ms[0] for p in profiles)

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # idle workers wait for queries
        self._left = threading.Condition(self._lock)  # closers wait for workers to leave
        self._queue = padding.make_queue(profiles[0])
        self._meter = queue.Meter()
        self._idle = 0  # workers that wait on _work
        self._waking = False  # one of them has been notified and has not run yet
        self._failures = 0
        self._last_error: BaseException | None = None
        self._closing = threading.Event()
        # Rung by releasing it, which is safe in a finalizer: it takes no lock and runs no Python code.
        self._bell = threading.Lock()
        self._bell.acquire()

        self._runtime = contextlib.ExitStack()
        if tune_runtime:
            self._runtime.enter_context(runtime.low_latency())
        self._workers: list[Worker] = []
        for i, (e, profile) in enumerate(zip(engines, profiles, strict=True)):
            worker = Worker(e, i, profile)
            worker.thread = threading.Thread(target=self._work_on, args=(worker,), name=f"superserve-{e.name}", daemon=True)
            self._workers.append(worker)
        self._alive = len(self._workers)
        self._watchdog = threading.Thread(target=self._watch, name="superserve-watchdog", daemon=True)
        for thread in (*(w.thread for w in self._workers), self._watchdog):
            thread.start()

    # -- called by clients --------------------------------------------------------------------------------------------------

    def admit(self, queries: Sequence[Query]) -> None:
        """Queues all of `queries`, which share deadline and floor, or raises and queues none."""
        with self._lock:
            if self._closing.is_set():
                raise errors.ServerClosedError("the server is closed and takes no queries; open a new one")
            if not self._alive:
                raise self._lost_error()
            if len(self._queue) + len(queries) > self._max_queue:
                raise errors.QueueFullError(
                    f"{len(self._queue)} queries wait and {len(queries)} more would exceed max_queue={self._max_queue}; "
                    "submit more slowly, add devices, or raise max_queue"
                )
            if queries:
                first = queries[0]
                lengths = [query.length for query in queries] if self._has_lengths else ()
                self._queue.push_all(first.deadline_s, queries, first.floor, lengths)
                self._meter.shorten(first.submitted_s, 1e3 * (first.deadline_s - first.submitted_s))
            self._locked_wake()

    def stop(self, *, drain: bool) -> None:
        """From now on nothing is admitted, and workers leave once nothing waits; without `drain` what waits is failed."""
        with self._lock:
            self._closing.set()
            waiting = [] if drain else self._queue.drain()
            self._work.notify_all()
        for query in waiting:
            query.set_exception(errors.ServerClosedError("the server was closed without draining before this query ran"))

    def close(self, *, drain: bool, timeout_s: float | None) -> None:
        """See `Server.close`."""
        self.stop(drain=drain)
        if threading.current_thread() in (self._watchdog, *(w.thread for w in self._workers)):
            return  # a done-callback closes its own server: the thread that it would wait for is the one that it runs in
        if not self._wait_until_left(timeout_s):
            reason = f"the server was closed, and after {timeout_s} s this query had still not been answered"
            self._remove(lambda worker: True, lambda: errors.ServerClosedError(reason), abandon=True)
        for worker in self._workers:
            if not worker.abandoned:
                worker.thread.join()
        self._watchdog.join()

    def ring(self) -> None:
        """Tells the watchdog that the server is gone. May be called from anywhere, any number of times."""
        with contextlib.suppress(RuntimeError):  # it has been rung before
            self._bell.release()

    def health(self) -> dict[str, Any]:
        """See `Server.health`."""
        with self._lock:
            return {
                "workers": len(self._workers),
                "alive": self._alive,
                "abandoned": sum(w.abandoned for w in self._workers),
                "failures": self._failures,
                "last_error": None if self._last_error is None else repr(self._last_error),
                "waiting": len(self._queue),
                "running": sum(len(w.batch) for w in self._workers if w.alive),
                "closed": self._closing.is_set(),
                "slowdowns": self._fleet.slowdowns(),
            }

    # -- the worker threads -------------------------------------------------------------------------------------------------

    def _work_on(self, worker: Worker) -> None:
        try:
            while self._turn(worker):
                pass
        except BaseException as error:  # a bug here, since engines, policies and callbacks are caught where they are called
            _log.exception("worker %s ends", worker.engine.name)
            self._last_error = error
        finally:
            self._remove(lambda w: w is worker, self._lost_error)

    def _turn(self, worker: Worker) -> bool:
        """Waits for one batch, runs it and answers it. False when the worker is to leave."""
        with self._lock:
            worker.batch = ()
            while worker.alive and not len(self._queue) and not self._closing.is_set():
                self._idle += 1
                self._work.wait()
                self._idle -= 1
                self._waking = False
            if not worker.alive or not len(self._queue):
                return False
            now_s = self._clock()
            expired = self._locked_prune(now_s)
            row, batch, error = self._locked_decide(worker, now_s)
            worker.batch, worker.started_s = batch, now_s
            self._locked_wake()
        for query in expired:
            query.set_exception(
                errors.DeadlineExpiredError(
                    "dropped, since its deadline could no longer be met (expire=True); "
                    "allow a longer slo_ms, submit more slowly, or serve late with expire=False"
                )
            )
        if row is None:
            for query in batch:
                query.set_exception(_caused(errors.InferenceError(f"the policy failed: {error!r}; mend it"), error))
            return True
        return not batch or self._run(worker, row, batch)

    def _locked_prune(self, now_s: float) -> list[Query]:
        """Takes from the front of the queue what need not run: cancelled queries, and with `expire` the hopeless, which
        are returned. A cancelled query counts as waiting until it reaches the front, of the deferred ones if it is one."""
        expired = self._queue.pop_before(now_s + self._fastest_s) if self._expire else []
        self._queue.drop_late(Query.done)
        while (head := self._queue.head()) is not None and head.done():
            self._queue.pop(1)
        return [query for query in expired if not query.done()]

    def _locked_decide(self, worker: Worker, now_s: float) -> tuple[Row | None, list[Query], BaseException | None]:
        """The row to run and the batch; where the policy failed, no row, the batch that suffers, and the error."""
        if not len(self._queue):
            return None, [], None
        try:
            row, batch, _ = dispatch.next_batch(
                self._queue,
                self._meter,
                self._policy,
                worker.profile,
                now_s,
                pace=self._fleet.pace(worker.index),
                last_subnet=worker.last_subnet,
                worker=worker.index,
            )
        except Exception as error:
            _log.exception("the policy failed")
            self._last_error = error
            return None, self._queue.pop(self._batch_sizes[-1]), error
        worker.last_subnet = row.subnet
        return row, [query for query in batch if not query.done()], None

    def _run(self, worker: Worker, row: Row, batch: list[Query]) -> bool:
        subnet, accuracy, count = row.subnet, row.accuracy, len(batch)
        size = self._padded[count]
        start_s = self._clock()
        try:
            outputs = list(worker.engine.run(subnet, self._batch_sizes[size], [query.inputs for query in batch]))
            if len(outputs) != count:
                raise errors.InferenceError(f"{len(outputs)} outputs for {count} inputs; an engine returns one for each")
        except BaseException as error:
            return self._failed(worker, error)
        finish_s = self._clock()
        worker.failures = 0
        compute_ms = 1e3 * (finish_s - start_s)
        self._fleet.observe(worker.index, row.latency_ms[size], compute_ms)
        # Where this worker has been abandoned meanwhile, its queries drop these answers, unless they still wait for another.
        make = futures.Reply._make  # half the cost of the constructor
        for query, output in zip(batch, outputs, strict=True):
            queue_ms = 1e3 * (start_s - query.submitted_s)
            met_slo = finish_s <= query.deadline_s
            query.set_result(make((output, subnet, accuracy, met_slo, queue_ms + compute_ms, queue_ms, compute_ms, count)))
        return True

    def _failed(self, worker: Worker, error: BaseException) -> bool:
        """Gives the batch of a failed run back. False when the worker is to leave."""
        _log.warning("%s failed on a batch of %d", worker.engine.name, len(worker.batch), exc_info=error)
        with self._lock:
            self._failures += 1
            self._last_error = error
            worker.failures += 1
            hopeless = self._locked_give_back(worker) if worker.alive else []
            alone = self._alive == 1
            self._locked_wake()
        for query in hopeless:
            query.set_exception(self._inference_error(query, worker, error))
        if worker.failures >= self._max_failures or not worker.alive:
            return False
        if not alone:
            # Time for the others to take the batch: else one broken device, always free, would use up every query's tries.
            self._closing.wait(self._pause_s * worker.failures)
        return True

    # -- what any thread may do ---------------------------------------------------------------------------------------------

    def _locked_wake(self) -> None:
        """Wakes one idle worker if there is work; it wakes the next. With one on its way, more would fight for the lock."""
        if self._idle and not self._waking and len(self._queue):
            self._waking = True
            self._work.notify()

    def _locked_give_back(self, worker: Worker) -> list[Query]:
        """Puts the worker's batch back into the queue, and returns the queries that have no slack or no try left."""
        now_s, hopeless = self._clock(), []
        for query in worker.batch:
            query.tries += 1
            if query.tries < self._max_tries and query.deadline_s > now_s:
                self._queue.push(query.deadline_s, query, query.floor, query.length)
            else:
                hopeless.append(query)
        worker.batch = ()
        return hopeless

    def _remove(
        self, which: Callable[[Worker], bool], reason: Callable[[], errors.SuperServeError], *, abandon: bool = False
    ) -> None:
        """Takes workers out of service. When none is left, everything that waits fails for `reason`."""
        failed: list[tuple[Query, errors.SuperServeError]] = []
        with self._lock:
            for worker in self._workers:
                if worker.alive and which(worker):
                    worker.alive, worker.abandoned = False, abandon
                    self._alive -= 1
                    self._fleet.leave(worker.index)
                    if abandon and worker.batch:
                        ran_s = self._clock() - worker.started_s
                        self._last_error = TimeoutError(f"{worker.engine.name} has not returned for {ran_s:.3g} s")
                    failed += [(q, self._inference_error(q, worker, self._last_error)) for q in self._locked_give_back(worker)]
            if not self._alive:
                failed += [(query, reason()) for query in self._queue.drain()]
                self.ring()
            self._locked_wake()
            self._left.notify_all()
        for query, error in failed:
            query.set_exception(error)

    def _watch(self) -> None:
        """Abandons workers that are stuck, and closes what a server that was dropped without `close` has left."""
        while not self._bell.acquire(timeout=self._stall_s / 4):
            self._abandon_stuck()
        if self._alive:
            self.stop(drain=False)
        while not self._wait_until_left(self._stall_s / 4):
            self._abandon_stuck()
        self._runtime.close()

    def _abandon_stuck(self) -> None:
        latest_s = self._clock() - self._stall_s
        self._remove(lambda w: bool(w.batch) and w.started_s < latest_s, self._lost_error, abandon=True)

    def _wait_until_left(self, timeout_s: float | None) -> bool:
        with self._lock:
            return self._left.wait_for(lambda: not self._alive, timeout_s)

    def _lost_error(self) -> errors.SuperServeError:
        reason = f"the last of {len(self._workers)} workers has left; its last error was {self._last_error!r}"
        return _caused(errors.WorkersLostError(f"{reason}. Look into that error and open a new server"), self._last_error)

    def _inference_error(self, query: Query, worker: Worker, error: BaseException | None) -> errors.SuperServeError:
        why = "no slack was left to try again" if query.tries < self._max_tries else f"it failed {query.tries} times"
        message = f"{worker.engine.name} failed on this query's batch, and {why}. Cause: {error!r}; see the server's log"
        return _caused(errors.InferenceError(message), error)


def _caused(error: errors.SuperServeError, cause: BaseException | None) -> errors.SuperServeError:
    error.__cause__ = cause
    return error
