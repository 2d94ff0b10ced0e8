"""The pool of a server: its workers, its lock, and the queries that wait. No jax.

One class, because its parts change together, under one lock. `server.py` opens with the map of threads and locks. Methods
named `locked_...` expect the caller to hold the lock.
"""

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Policy
from superserve_jax.serving import runtime, threads
from superserve_jax.serving.backlog import Backlog
from superserve_jax.serving.flight import Failure, Flight
from superserve_jax.serving.futures import Query
from superserve_jax.serving.lost import Lost
from superserve_jax.serving.members import Members
from superserve_jax.serving.options import Options
from superserve_jax.serving.policy_call import PolicyCall
from superserve_jax.serving.retries import Retry
from superserve_jax.serving.runtime import ProcessTies
from superserve_jax.serving.swaps import Swaps
from superserve_jax.serving.telemetry import Counters
from superserve_jax.serving.threads import IdleWorkers, Outbox, Watchdog
from superserve_jax.serving.worker import Gone, Worker

_LAST_S = 0.1  # `close` may exceed its time limit by this for callbacks, and once more for threads that are about to end
_EXIT_S = 1.0  # at the interpreter's exit: the longest wait for running batches


@final
class Pool:
    """Everything that the threads of one server share.

    Threads refer to the pool, never to the `Server`. So an unused `Server` is garbage collected, and its pool then closes.

    Args:
      engines, profiles: one profile for each engine.
      make_policy: makes the policy for a profile.
      options: see `options.ServerOptions`.
      input_bytes: size of one input of the longest length.
      again: returns `Server.add_worker`, or None if the server is gone. For lost workers, see `lost.py`.

    Attributes, besides the parts of the pool:
      pause_s: how long a worker pauses after its first failed batch; n times as long after n failed batches in a row.
      idle: the workers that wait for work.
      closing, exits: whether the pool is closed, and whether the interpreter exits.
      changed: other threads wait for it until workers have left or changed over, or a user's policy has returned.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        profiles: Sequence[Profile],
        make_policy: Callable[[Profile], Policy],
        options: Options,
        *,
        input_bytes: int,
        again: Callable[[], Callable[[Any], str] | None] = lambda: None,
    ):
        self.make_policy = functools.lru_cache(make_policy)  # workers with equal profiles share a policy
        for profile in profiles:  # may raise; nothing has been started yet
            self.make_policy(profile)
        self.clock, self.options, self.pause_s = options.clock, options, min(1e-3 * options.slo_ms, 1.0)

        self.lock = threading.RLock()
        self.is_held_here = threads.held_here(self.lock)
        self.policy_call, self.swaps, self.lost = PolicyCall(self), Swaps(self), Lost(self, again)
        self.idle, self.changed = IdleWorkers(self.lock), threading.Condition(self.lock)
        self.outbox = Outbox(self.lock)

        self.counters = Counters(profiles[0])
        self.backlog = Backlog(profiles[0], options, input_bytes=input_bytes, outbox=self.outbox, counters=self.counters)
        self.members = Members(self.outbox, correct=options.follow_drift)
        self.closing = self.exits = False

        self._opened_s = self.clock()
        self.process = ProcessTies(self._end, tune_runtime=options.tune_runtime)
        with contextlib.ExitStack() as undo:
            undo.callback(self.process.release)
            self._watchdog = Watchdog(self)  # after `close` it calls `release`
            undo.pop_all()
            undo.callback(self.close, drain=False, timeout_s=None)
            for engine, profile in zip(engines, profiles, strict=True):
                self.add(engine, profile)
            self._health, self._snapshot = self.health(), self.snapshot()
            undo.pop_all()

    def describe(self, profile: Profile) -> str:
        """Subnets, workers, state, and counts of queries, in one line. See `Server.__repr__`."""
        accuracies = [row.accuracy for row in profile.rows]
        some = f"{len(accuracies)} subnets with accuracies {min(accuracies):.4g} to {max(accuracies):.4g}"
        try:
            now = self.snapshot()
        except errors.ServerClosedError:
            return f"{some}, in a fork of its process"
        names = [
            worker["name"] for worker in now["workers"] if worker["state"] in ("idle", "deciding", "running", "answering")
        ]
        counts = {"waiting": now["waiting"], "running": now["running"], **now["queries"]}
        shown = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        state = "closed" if self.closing else f"open on {', '.join(names) or 'no worker'}"
        return f"{some}, {state}, {shown or 'no queries yet'}"

    def is_inside(self) -> bool:
        """Whether the calling thread holds the lock or is in the policy (see rule 2 in `server.py`)."""
        return self.is_held_here() or self.policy_call.is_here()

    # -- calls of clients -------------------------------------------------------------------------------------------------

    def admit(self, queries: Sequence[Query]) -> None:
        """Queues all of `queries`, which share deadline and floor, or raises and queues none."""
        self.process.refuse_fork()
        if self.is_inside():
            self._check_open("takes no queries")
            self._watchdog.defer(functools.partial(self._admit_late, queries))
            return
        try:
            with self.lock:
                self.counters.arrived += len(queries)
                if self.closing or not self.members.alive:  # saves a call if all is well
                    self.locked_check_serving("takes no queries")
                if queries:
                    self.backlog.add(queries, self.members.fleet, idle=self.idle.count > 0)
                    self.counters.admitted += len(queries)
                    self.idle.wake_one()
        finally:
            if self.outbox.entries:
                self.outbox.empty()

    def _admit_late(self, queries: Sequence[Query]) -> None:
        """Like `admit`, for queries whose client has its futures already: an error resolves them."""
        try:
            self.admit(queries)
        except errors.SuperServeError as error:
            with self.lock:
                for query in queries:
                    self.outbox.fail(query, error)
            self.outbox.empty()

    def add(self, engine: Engine, profile: Profile) -> str:
        """See `Server.add_worker`."""
        self.process.refuse_fork()
        if (dtype := getattr(engine, "compute_dtype", profile.compute_dtype)) != profile.compute_dtype:
            raise errors.ConfigError(
                f"{engine.name} computes in {dtype}, but its profile has accuracies in {profile.compute_dtype}; give a "
                "profile that was measured with this engine"
            )
        policy = self.make_policy(profile)
        with self.lock:
            self._check_open("takes no workers")
            name, index = self.members.free_place(engine.name)
        worker = Worker(self, engine, profile, policy, name=name, index=index)
        try:
            with errors.StartingThreads():  # not under the lock: a thread that starts may run a finalizer that submits
                worker.thread.start()
            with self.lock:
                self._check_open("takes no workers")
                if self.exits:
                    raise errors.ServerClosedError("the interpreter exits, so the server takes no workers")
                self.lost.locked_join()
                self.outbox.drop(self.members.workers)  # it keeps a worker that is replaced
                self.members.join(worker)
                self.locked_offer()
                self.counters.know(profile)
                self.locked_notify_all()
        except BaseException:
            with self.lock:
                worker.locked_retire("left")
                self.locked_notify_all()
            del worker.thread  # it refers to the worker, and so to the engine
            raise
        self.outbox.empty()
        return name

    def remove(self, name: str) -> None:
        """See `Server.remove_worker`."""
        self.process.refuse_fork()
        with self.lock:
            if is_lost := not self.members.is_alive(name) and self.lost.locked_give_up(name):
                self.members.give_up(name)
                self.locked_notify_all()
        if is_lost:
            return self.lost.check()
        with self.lock:
            worker = self.members.removable(name)
            self.members.retire(worker, "removed")
            self.locked_offer()
            self.locked_notify_all()
            if self.is_own_thread():
                return  # in a done-callback: the worker may be this thread, or wait for it
            self.changed.wait_for(lambda: not worker.present)
        if worker.gone != "abandoned":
            worker.thread.join()

    def close(self, *, drain: bool, timeout_s: float | None) -> None:
        """See `Server.close`."""
        if self.process.is_fork():
            return
        if self.is_inside():
            self.closing = True
            self._watchdog.defer_to_a_thread(functools.partial(self.close, drain=drain, timeout_s=timeout_s))
            return
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C may interrupt the main thread at any moment, and no other one. So another thread closes, to the end.
            with contextlib.suppress(errors.ThreadStartError):
                threads.start(functools.partial(self._close, drain, timeout_s), "superserve-close").join()
                return
        self._close(drain, timeout_s)

    def _close(self, drain: bool, timeout_s: float | None) -> None:
        end_s = None if timeout_s is None else time.monotonic() + timeout_s

        def left_s(more_s: float = 0.0) -> float | None:
            return None if end_s is None else max(end_s + more_s - time.monotonic(), 0.0)

        self.stop(drain=drain, timeout_s=timeout_s)
        workers = self.members.workers
        if self.is_own_thread():
            return  # in a done-callback: it would wait for the thread that it runs in
        with self.lock:
            if not self.changed.wait_for(lambda: not self.members.any_present(), left_s()):
                reason = f"the server was closed, and after {timeout_s} s this query had still not been answered"
                self._locked_leave(workers, "abandoned", lambda: errors.ServerClosedError(reason))
        self._watchdog.ring()
        self.outbox.empty_within(left_s(_LAST_S))
        for thread in (*(worker.thread for worker in workers if worker.gone != "abandoned"), self._watchdog.thread):
            thread.join(left_s(2 * _LAST_S))
        self.lost.join()

    def stop(self, *, drain: bool, timeout_s: float | None = None) -> None:
        """Admits nothing from now on. Workers leave when nothing waits; without `drain`, everything that waits fails now."""
        reason = "the server was closed without draining before this query ran"
        with self.lock:
            self.closing = True
            if not drain:
                self.backlog.fail_all(lambda: errors.ServerClosedError(reason))
            self.locked_notify_all()
        self.outbox.empty_within(timeout_s)

    def dropped(self) -> None:
        """Stops a pool whose server was collected. Runs in a finalizer, so the watchdog does it."""
        self._watchdog.defer(functools.partial(self.stop, drain=False))

    def defer(self, work: Callable[[], object]) -> None:
        """Calls `work` in another thread, after this one has released the lock."""
        self.process.refuse_fork()
        self._check_open("cannot be changed")
        self._watchdog.defer_to_a_thread(work)

    def health(self) -> dict[str, Any]:
        """See `Server.health`."""
        self.process.refuse_fork()
        if not self.is_inside():
            with self.lock:
                self._health = self._locked_health(self.clock())
        return copy.deepcopy(self._health)

    def snapshot(self) -> dict[str, Any]:
        """See `Server.snapshot`."""
        self.process.refuse_fork()
        if self.is_inside():
            return copy.deepcopy(self._snapshot)
        with self.lock:
            now_s = self.clock()
            health, waiting = self._locked_health(now_s), self.backlog.items()
            counted = self.counters.snapshot(unanswered=health["waiting"] + health["running"])
            last_end_s = self.counters.last_end_s
        oldest_s = min((query.submitted_s for query in waiting if not query.done()), default=now_s)
        self._snapshot = {
            "uptime_s": now_s - self._opened_s,
            "waiting": health["waiting"],
            "running": health["running"],
            "oldest_wait_s": now_s - oldest_s,
            "last_batch_s": None if last_end_s is None else now_s - last_end_s,
            **counted,
            "workers": health["per_worker"],
        }
        return copy.deepcopy(self._snapshot)

    def _locked_health(self, now_s: float) -> dict[str, Any]:
        return {**self.members.health(now_s), "waiting": len(self.backlog), "closed": self.closing}

    # -- calls of workers -------------------------------------------------------------------------------------------------

    def locked_wait_for_work(self, worker: Worker) -> bool:
        """Waits until there is something to do for `worker`. False when it is to leave."""
        while worker.alive and not self.locked_has_work(worker) and not worker.successor and not self.outbox.entries:
            if self.closing and self.policy_call.thread is None:
                return False
            self.idle.wait()
        return worker.alive

    def locked_has_work(self, worker: Worker) -> bool:
        """Whether a batch waits that `worker` may run, and no other worker decides about one."""
        if self.policy_call.thread is not None:
            return False
        return len(self.backlog.queue) > 0 or self.locked_find_retry(worker) is not None

    def locked_find_retry(self, worker: Worker) -> Retry | None:
        """See `Retries.find`. While the pool closes, no worker waits for another one to take a retry."""
        retries = self.backlog.retries
        return retries.find(worker.index, workers=1 if self.closing else self.members.alive) if retries.groups else None

    def locked_wake_one(self) -> None:
        """Wakes one idle worker if there is work."""
        if self.idle.count and len(self.backlog.queue):
            self.idle.wake_one()

    def locked_retry(self, worker: Worker, flight: Flight, failure: Failure, *, hung: bool = False) -> None:
        """See `Backlog.retry`."""
        where = {"worker": worker.index, "name": worker.name, "workers": self.members.alive}
        self.backlog.retry(flight, failure, **where, now_s=self.clock(), hung=hung)

    def leave(self, workers: Iterable[Worker], gone: Gone, reason: Callable[[], errors.SuperServeError]) -> None:
        """Takes workers out of service for good. If none is alive afterwards, all waiting queries fail with `reason()`."""
        with self.lock:
            self._locked_leave(workers, gone, reason)
        self.outbox.empty()

    def _locked_leave(self, workers: Iterable[Worker], gone: Gone, reason: Callable[[], errors.SuperServeError]) -> None:
        for worker in workers:
            if worker.present:
                if gone in ("lost", "abandoned"):
                    self.lost.locked_expect(worker)
                self.members.retire(worker, gone)
                self.locked_offer()
                worker.locked_leave(hung=gone == "abandoned")
        if not self.members.alive and not self.lost.locked_is_hoped():
            self.backlog.fail_all(reason)
        self.locked_notify_all()
        if self.closing:
            self._watchdog.ring()  # the last worker may have left

    def locked_offer(self) -> None:
        """Updates what the live workers offer (see `Members.offer`). Nothing changes if none is alive."""
        if (offer := self.members.offer()) is not None:
            self.backlog.offer(*offer)

    def is_own_thread(self) -> bool:
        """Whether the calling thread belongs to this pool."""
        return threading.current_thread() in (self._watchdog.thread, *(worker.thread for worker in self.members.workers))

    def locked_notify_all(self) -> None:
        """Wakes every thread that waits for a change of the pool."""
        self.idle.wake_all()
        self.changed.notify_all()

    # -- calls of the watchdog --------------------------------------------------------------------------------------------

    def abandon_stuck(self, *, excused_s: float = 0.0) -> None:
        """Abandons the workers that are stuck in a batch (see `Worker.locked_is_stuck`)."""
        with self.lock:
            now_s = self.clock()
            self.policy_call.locked_excuse(excused_s)
            if stuck := [worker for worker in self.members.workers if worker.locked_is_stuck(now_s, excused_s)]:
                self._locked_leave(stuck, "abandoned", self.members.lost_error)
            if self.policy_call.is_overdue(now_s):
                self.policy_call.locked_forget()  # not a worker's call, but a swap's
        self.outbox.empty()

    def ended(self) -> bool:
        """Whether the pool is closed and its last worker has left."""
        with self.lock:
            return self.closing and not self.members.any_present()

    def _end(self) -> None:
        """Ends the workers before the interpreter exits. Running batches are answered. Waiting queries stay unanswered.

        If they failed, only daemon threads could see the errors, and would print them after the program's last output.
        """
        if self.process.is_fork():
            return
        with self.lock:
            self.exits = True
            for worker in self.members.workers:
                worker.locked_retire()
            self.locked_notify_all()
            self.changed.wait_for(lambda: not self.members.any_present(), _EXIT_S)
        for worker in self.members.workers:
            worker.thread.join(0 if worker.present else _EXIT_S)
        self.lost.join()
        runtime.wait_for_collection(_EXIT_S)

    def _check_open(self, what: str) -> None:
        if self.closing:
            raise errors.ServerClosedError(f"the server is closed and {what}; open a new one")

    def locked_check_serving(self, what: str) -> None:
        """Raises ServerClosedError or WorkersLostError if no worker will take a batch."""
        self._check_open(what)
        if not self.members.alive and not self.lost.locked_is_hoped():
            raise self.members.lost_error()
