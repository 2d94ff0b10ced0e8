"""Who serves: the workers of one server, how they come and go, and how all of it ends. No jax.

`Crew` is the part of `workers.Pool` that runs once per worker, not once per batch. `server.py` opens with the map of threads
and locks. Methods named `_locked_...` expect the caller to hold the lock.

A worker is *alive* while it takes batches, and *present* until its thread has ended or was abandoned. In between, one that was
removed finishes its batch.
"""

import atexit
import contextlib
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.policies import Policy
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.serving import retries, runtime
from superserve_jax.serving.futures import Query
from superserve_jax.serving.options import Options
from superserve_jax.serving.retries import Retries
from superserve_jax.serving.roster import Flight, Worker
from superserve_jax.serving.telemetry import Counters

_PATIENCE = 20  # a batch that takes so many times its profiled p99 will not come back
_EXIT_S = 1.0  # how long the interpreter's exit waits for running batches


class Crew:
    """Workers, watchdog and what waits. A subclass says in `_work_on` what a worker does."""

    def __init__(
        self,
        profiles: Sequence[Profile],
        make_policy: Callable[[Profile], Policy],
        settings: Options,
    ):
        clock = self._clock = settings.clock
        self._overlap, self._follow_drift, self._stall_s = settings.overlap, settings.follow_drift, settings.stall_s
        profile = profiles[0]
        self._make_policy = functools.cache(make_policy)  # one for all workers that are alike
        for each in profiles:  # which may fail: before anything is begun that would have to be ended
            self._make_policy(each)
        self._fleet = Fleet(correct=self._follow_drift)
        self.best = math.inf  # the greatest accuracy that every worker offers
        self._fastest_s = math.inf  # the least that a query takes
        self._pid = os.getpid()

        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # idle workers wait for queries
        self._left = threading.Condition(self._lock)  # closers wait for workers to leave
        self._queue = length_queue.make_queue(profile)
        self._meter = ArrivalMeter()
        self._retries = Retries(profile, max_tries=settings.max_tries)
        self._counters = Counters(profile)
        self._opened_s = clock()
        self._workers: list[Worker] = []
        self._alive = self._abandoned = self._failures = 0
        self._last_error: BaseException | None = None
        self._closing = threading.Event()
        # Rung by releasing it, which is safe in a finalizer: it takes no lock and runs no Python code.
        self._bell = threading.Lock()
        self._bell.acquire()

        self._runtime = contextlib.ExitStack()
        if settings.tune_runtime:
            self._runtime.enter_context(runtime.low_latency())
        self._watchdog = threading.Thread(target=self._watch, name="superserve-watchdog", daemon=True)
        # A daemon thread that is still at work while the interpreter is taken down can crash it.
        atexit.register(self._exit)

    # -- called by clients --------------------------------------------------------------------------------------------------

    def add(self, new: Engine, profile: Profile) -> str:
        """See `Server.add_worker`."""
        self._check_process()
        policy = self._make_policy(profile)
        with self._lock:
            if self._closing.is_set():
                raise errors.ServerClosedError("the server is closed and takes no workers; open a new one")
            taken = {w.name for w in self._workers if w.present}
            names = itertools.chain([new.name], (f"{new.name} ({n})" for n in itertools.count(2)))
            name = next(n for n in names if n not in taken)
            used = {w.index for w in self._workers if w.present}
            index = next(i for i in itertools.count() if i not in used)
            worker = Worker(new, name, index, profile, policy, self._overlaps(new))
            self._fleet.join(index, profile)
            self._workers = [*(w for w in self._workers if w.name != name), worker]
            self._alive += 1
            self._locked_recount()
            self._counters.know(profile)
            refused = self._locked_refuse()
            worker.thread = threading.Thread(target=self._work_on, args=(worker,), name=f"superserve-{name}", daemon=True)
            worker.thread.start()
        for query, error in refused:
            query.set_exception(error)
        return name

    def remove(self, name: str) -> None:
        """See `Server.remove_worker`."""
        self._check_process()
        with self._lock:
            found = {w.name: w for w in self._workers if w.alive}
            if name not in found:
                raise errors.unknown_name("worker", name, found)
            if len(found) == 1:
                raise errors.ConfigError(f"{name} is the last worker; add another before you remove it, or close the server")
            worker = found[name]
            worker.alive, worker.gone = False, "removed"
            self._alive -= 1
            self._fleet.leave(worker.index)
            self._locked_recount()
            self._work.notify_all()
            if threading.current_thread() in (worker.thread, self._watchdog):
                return  # a done-callback removes the worker that it runs in, or one that only this thread could abandon
            self._left.wait_for(lambda: not worker.present)
        if worker.gone != "abandoned":
            worker.thread.join()

    def stop(self, *, drain: bool) -> None:
        """From now on nothing is admitted, and workers leave once nothing waits; without `drain` what waits is failed."""
        with self._lock:
            self._closing.set()
            waiting = [] if drain else self._locked_drain()
            self._work.notify_all()
        for query in waiting:
            query.set_exception(errors.ServerClosedError("the server was closed without draining before this query ran"))

    def close(self, *, drain: bool, timeout_s: float | None) -> None:
        """See `Server.close`."""
        if os.getpid() != self._pid:
            return  # a fork has none of the threads, and its copy of the lock may never be free
        self.stop(drain=drain)
        workers = self._workers
        if threading.current_thread() in (self._watchdog, *(w.thread for w in workers)):
            return  # a done-callback closes its own server: the thread that it would wait for is the one that it runs in
        if not self._wait_until_left(timeout_s):
            reason = f"the server was closed, and after {timeout_s} s this query had still not been answered"
            self._drop([w for w in workers if w.present], "abandoned", lambda: errors.ServerClosedError(reason))
        for worker in workers:
            if worker.gone != "abandoned":
                worker.thread.join()
        self.ring()
        self._watchdog.join()

    def ring(self) -> None:
        """Tells the watchdog that the server is gone. May be called from anywhere, any number of times."""
        with contextlib.suppress(RuntimeError):  # it has been rung before
            self._bell.release()

    def health(self) -> dict[str, Any]:
        """See `Server.health`."""
        self._check_process()
        with self._lock:
            return self._locked_health(self._clock())

    def snapshot(self) -> dict[str, Any]:
        """See `Server.snapshot`."""
        self._check_process()
        with self._lock:
            now_s = self._clock()
            health = self._locked_health(now_s)
            counted = self._counters.snapshot(unanswered=health["waiting"] + health["running"])
            waiting = self._queue.items() + self._retries.items()
        oldest_s = min((query.submitted_s for query in waiting if not query.done()), default=now_s)
        return {
            "uptime_s": now_s - self._opened_s,
            "waiting": health["waiting"],
            "running": health["running"],
            "oldest_wait_s": now_s - oldest_s,
            **counted,
            "workers": health["per_worker"],
        }

    def _locked_health(self, now_s: float) -> dict[str, Any]:
        return {
            "workers": len(self._workers),
            "alive": self._alive,
            "abandoned": self._abandoned,
            "failures": self._failures,
            "last_error": None if self._last_error is None else repr(self._last_error),
            "waiting": len(self._queue) + self._retries.waiting(),
            "running": sum(len(flight.batch) for w in self._workers if w.present for flight in w.flights),
            "closed": self._closing.is_set(),
            "per_worker": [w.health(now_s, self._fleet) for w in self._workers],
        }

    # -- leaving ------------------------------------------------------------------------------------------------------------

    def _work_on(self, worker: Worker) -> None:
        """What a worker's thread runs; it ends with `_drop`."""
        raise NotImplementedError

    def _drop(
        self, workers: Iterable[Worker], gone: Literal["left", "abandoned"], reason: Callable[[], errors.SuperServeError]
    ) -> None:
        """Takes workers out of service for good. When none is alive, everything that waits fails for `reason`."""
        with self._lock:
            failed = self._locked_drop_all(workers, gone, reason)
        for query, error in failed:
            query.set_exception(error)

    def _locked_drop_all(
        self, workers: Iterable[Worker], gone: Literal["left", "abandoned"], reason: Callable[[], errors.SuperServeError]
    ) -> list[tuple[Query, errors.SuperServeError]]:
        """See `_drop`. Returns the queries that are given up, and why."""
        failed: list[tuple[Query, errors.SuperServeError]] = []
        for worker in workers:
            if worker.present:
                failed += self._locked_drop(worker, gone)
        if not self._alive:
            failed += [(query, reason()) for query in self._locked_drain()]
        self._work.notify_all()  # what has been given back is not for every worker; and it may be the last that is left
        self._left.notify_all()
        return failed

    def _locked_recount(self) -> None:
        """Finds what the workers that are alive, or those that come after them, offer; as it was where none is alive."""
        if profiles := [(w.successor or w).profile for w in self._workers if w.alive]:
            self.best = min(p.rows[-1].accuracy for p in profiles)
            self._fastest_s = min(1e-3 * p.at_length(0).fastest().latency_ms[0] for p in profiles)

    def _locked_drop(self, worker: Worker, gone: Literal["left", "abandoned"]) -> list[tuple[Query, errors.SuperServeError]]:
        self._alive -= worker.alive
        self._fleet.leave(worker.index)
        worker.alive = worker.present = False
        worker.successor = None
        self._locked_recount()
        if gone == "abandoned":
            worker.gone = gone
            self._abandoned += 1
            ran_s = self._clock() - worker.watched_s if worker.flights else 0.0
            worker.last_error = self._last_error = TimeoutError(f"{worker.name} has not returned for {ran_s:.3g} s")
        worker.gone = worker.gone or gone
        flights, worker.flights = worker.flights, []
        failed = []
        # To blame is the batch that is being handed over, or else waited for or answered. One behind it has not begun, and one
        # that is left of a worker which failed at another has not failed.
        hands_over = next((f for f in flights if f.launched is f.refused is None), None)
        blamed = hands_over or (flights[0] if flights and (gone == "abandoned" or worker.landed) else None)
        for flight in flights:
            if flight is blamed:
                failed += self._locked_failed(worker, flight, worker.last_error, hung=gone == "abandoned")
            else:
                self._locked_give_back(worker, flight)
        return failed

    def _locked_give_back(self, worker: Worker, flight: Flight) -> None:
        """Puts a batch back to where it came from; it does not count as tried."""
        self._counters.requeued += sum(not query.done() for query in flight.batch)
        if flight.retry is not None:
            self._retries.give_back(flight.batch, flight.retry, worker.index)
        else:
            for query in flight.batch:
                self._queue.push(query.deadline_s, query, query.floor, query.length)

    def _locked_failed(
        self, worker: Worker, flight: Flight, error: BaseException | None, *, hung: bool = False
    ) -> list[tuple[Query, errors.SuperServeError]]:
        """What becomes of a batch that failed. Returns the queries that are given up, and why."""
        batch = flight.batch
        live = sum(not query.done() for query in batch)
        hopeless = self._retries.failed(batch, flight.retry, worker.index, now_s=self._clock(), workers=self._alive, hung=hung)
        self._counters.failed += len(hopeless)
        self._counters.requeued += live - len(hopeless)
        given_up = [(query, retries.inference_error(query, worker.name, why, error)) for query, why in hopeless]
        return given_up + self._locked_refuse()

    def _locked_refuse(self) -> list[tuple[Query, errors.SuperServeError]]:
        """Takes what waits and asks for more accuracy than there is since a swap, or since a worker joined. Returns these
        queries, and why."""
        refused = self._queue.pop_above(self.best) + self._retries.pop_above(self.best)
        live = [query for query in refused if not query.done()]
        self._counters.failed += len(live)
        return [(query, self._floor_error(query)) for query in live]

    def _locked_drain(self) -> list[Query]:
        """Takes everything that waits, to be failed."""
        waiting = [query for query in (*self._queue.drain(), *self._retries.drain()) if not query.done()]
        self._counters.failed += len(waiting)
        return waiting

    def _wait_until_left(self, timeout_s: float | None) -> bool:
        with self._lock:
            return self._left.wait_for(lambda: not any(w.present for w in self._workers), timeout_s)

    # -- the watchdog's thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Abandons workers that are stuck, and closes what a server that was dropped without `close` has left."""
        period_s = self._stall_s / 4
        due_s = time.monotonic() + period_s
        while not self._bell.acquire(timeout=period_s):
            self._abandon_stuck(due_s=due_s, grace_s=period_s)
            due_s = time.monotonic() + period_s
        if not self._closing.is_set():
            self.stop(drain=False)
        while not self._wait_until_left(period_s):
            self._abandon_stuck()
        self._runtime.close()
        atexit.unregister(self._exit)

    def _abandon_stuck(self, *, due_s: float = math.inf, grace_s: float = 0.0) -> None:
        """Abandons the workers whose batches should have been back long ago.

        Args:
          due_s: when this was to be called. If it is later than that by more than `grace_s`, the whole process stood still, as
            a suspended one does, which is no fault of a worker's.
        """
        with self._lock:
            now_s, late_s = self._clock(), time.monotonic() - due_s
            running = [w for w in self._workers if w.present and w.flights]
            if late_s > grace_s:
                for worker in running:  # a batch may have begun after that
                    worker.watched_s = min(worker.watched_s + late_s, now_s)
            stuck = [w for w in running if now_s - w.watched_s > self._patience_s(w)]
            if not stuck:
                return
            failed = self._locked_drop_all(stuck, "abandoned", self._lost_error)
        for query, error in failed:
            query.set_exception(error)

    def _patience_s(self, worker: Worker) -> float:
        """How long the batch of a worker may take."""
        flight = worker.flights[0]
        return max(self._stall_s, 1e-3 * _PATIENCE * flight.row.p99_ms[flight.place])

    def _overlaps(self, new: Engine) -> bool:
        """Whether a worker with this engine stages its next batch while the device computes."""
        gains = getattr(new, "overlap", None)  # None of an engine that cannot
        return gains is not None and (gains if self._overlap is None else self._overlap)

    # -- errors -------------------------------------------------------------------------------------------------------------

    def _lost_error(self) -> errors.SuperServeError:
        reason = f"the last of {len(self._workers)} workers has left; its last error was {self._last_error!r}"
        remedy = "Look into that error, and add a worker or open a new server"
        return retries.caused(errors.WorkersLostError(f"{reason}. {remedy}"), self._last_error)

    def _floor_error(self, query: Query) -> errors.SuperServeError:
        return errors.AccuracyFloorError(
            f"min_accuracy={query.floor}, but the best subnet that every worker serves now has {self.best}; ask for no more"
        )

    def _check_process(self) -> None:
        """Raises ServerClosedError in a fork: it has the server's memory but none of its threads."""
        if os.getpid() != self._pid:
            raise errors.ServerClosedError(
                f"the server belongs to process {self._pid}, this is its fork {os.getpid()}, which has none of its threads; "
                "open the server after forking, or submit in the process that opened it"
            )

    def _exit(self) -> None:
        """Before the interpreter goes, ends the workers after the batches that they run.

        What waits is left waiting: only daemon threads are there to see it, which go without a word where an error would be
        the last thing on the screen.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            for worker in self._workers:
                worker.alive = False
            self._work.notify_all()
            self._left.wait_for(lambda: not any(w.present for w in self._workers), _EXIT_S)
        for worker in self._workers:
            worker.thread.join(0 if worker.present else _EXIT_S)
