"""One worker of a server: its engine, its thread, its decisions and its answers. No jax.

Three parts have a module each: the batches under way (`underway.py`), what follows when the engine fails (`failures.py`), and
what is at fault (`blame.py`). `server.py` lists threads and locks. Methods `locked_...` need the pool's lock.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

from superserve_jax import foreign
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy
from superserve_jax.serving import futures
from superserve_jax.serving.blame import Blame
from superserve_jax.serving.failures import Failures
from superserve_jax.serving.flight import Failure, Flight, OverlapPace, may_overlap, refill
from superserve_jax.serving.lost import Suspicion, place_of
from superserve_jax.serving.policy_call import OutdatedError
from superserve_jax.serving.telemetry import Batch
from superserve_jax.serving.underway import Underway
from superserve_jax.subnet import Subnet

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.swaps import Successor

_log = logging.getLogger(__name__)

_AT_ONCE_S = 2e-5  # a shorter wait for the device, after a sleep, means that the worker woke up too late

Gone = Literal["", "left", "lost", "abandoned", "removed"]


@final
class Worker:
    """Serves batches on one engine, in a thread of its own.

    Args:
      pool: the state that the workers of a server share.
      engine: computes the batches on one device.
      profile: the engine's latencies, for the batch sizes that it may run.
      policy: the policy for that profile.
      name, index: the worker's name and number. No other present worker has the same.

    Attributes, all written under the pool's lock:
      underway, failures, blame: the parts that have a module each.
      successor: after a swap, the engine, profile and policy for the next batches.
      alive, present: see `members.Members`.
      gone: why the worker takes no more batches; "" until then.
      batches: how many it answered.
      sizes: the padded batch sizes. They stay, while the profile may lose the largest.
      overlaps: whether it hands over a batch while the last one runs.
      place: the process of the engine, if the engine is in another one.
    """

    def __init__(self, pool: "Pool", engine: Engine, profile: Profile, policy: Policy, *, name: str, index: int):
        self.engine, self.profile, self.policy = engine, profile, policy
        self.name, self.index = name, index
        self.thread = threading.Thread(target=self._run, name=f"superserve-{name}", daemon=True)
        self.successor: Successor | None = None
        self.alive = self.present = False  # until it joins
        self.gone: Gone = ""
        self.underway, self.failures, self.blame = Underway(), Failures(pool), Blame(pool)
        self.batches = 0
        self._pool, self.sizes = pool, profile.batch_sizes
        self._places = [profile.batch_index(count) for count in range(profile.max_batch + 1)]
        self.overlaps, self.place = may_overlap(engine, pool.options.overlap), place_of(engine)
        self.overlap_pace = OverlapPace()
        self._last_subnet: Subnet | None = None
        self._answered: Batch | None = None  # an answered batch that the counters do not know yet
        self._free_s = 0.0  # when the device was done with the last batch

    # -- the thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pool = self._pool
        try:
            with pool.lock:
                pool.changed.wait_for(lambda: self.alive or self.gone)
            while self._turn():
                pass
        except BaseException as error:  # a bug here: errors of engines, policies and callbacks are caught where they arise
            foreign.log(_log, logging.ERROR, "worker %s ends", self.name, error=error)
            failure = Failure.of(error)
            foreign.forget_frames(error)
            with pool.lock:
                self.failures.locked_note(failure)
        finally:
            pool.leave([self], "left", pool.members.lost_error)
            del self.engine, self.policy, self.place  # their memory is free now, while the health can still be read

    def _turn(self) -> bool:
        """Takes at most one batch, and answers at most one. False when the worker must leave."""
        pool, flight = self._pool, None
        with pool.lock:
            self._locked_settle()
            first = next(iter(self.underway.flights), None)
            if first is None:
                if not pool.locked_wait_for_work(self):
                    return False
                if self.successor is not None:  # it came while the worker was idle
                    self._locked_take_up(self.successor)
                now_s = pool.clock()
                flight = self._locked_take(now_s, now_s)
        self.make_calls()
        if first is not None:
            return self._turn_ahead(first)
        if flight is None:
            return True
        if self.overlaps or self.place is not None:  # a call to another process always says how long its device took
            self._launch(flight)
        # If it overlaps, the next turn may take another batch, and answers this one.
        return self.overlaps or self._land(flight)

    def _turn_ahead(self, first: Flight) -> bool:
        """Takes the next batch when the device is nearly done with the first, and then answers the first."""
        if first.failure is not None:
            return self._land(first)
        pool, flight = self._pool, None
        profiled_s = 1e-3 * first.row.latency_ms[first.place]
        wake_s, asked_s = self.overlap_pace.wake_s(first.started_s, profiled_s, self.engine), pool.clock()
        slept = wake_s > asked_s
        if slept:
            time.sleep(wake_s - asked_s)
        with pool.lock:
            # A worker that must leave or change over, or whose last batch failed, answers its batch first. A retry runs alone.
            can = self.alive and self.overlaps and self.successor is None and first.retry is None
            if can and not self.failures.strikes and pool.locked_has_work(self) and pool.locked_find_retry(self) is None:
                now_s = pool.clock()
                flight = self._locked_take(now_s, max(now_s, self.overlap_pace.done_s(first.started_s, profiled_s)))
        self.make_calls()
        if flight is not None:
            first.shared = flight.shared = True
            self._launch(flight)
            self.overlap_pace.observe_host(pool.clock() - max(wake_s, asked_s))
        return self._land(first, slept=slept)

    def make_calls(self) -> None:
        """Empties the outbox."""
        if self._pool.outbox.entries:
            self.underway.excusing(self._pool.outbox.empty, self._pool.clock)

    # -- decisions --------------------------------------------------------------------------------------------------------

    def _locked_settle(self) -> None:
        """Removes the flight that the last turn answered, and counts it. Done only now, since a turn begins with the lock."""
        if self.underway.has_landed:
            self.underway.has_landed = False
            for flight in self.underway.flights[:1]:  # there is none if the worker has been abandoned meanwhile
                self.underway.remove(flight, free_s=self._free_s, now_s=self._pool.clock())
            if self._answered is not None:
                self._pool.counters.add(self._answered)
                self._answered = None

    def _locked_take(self, now_s: float, begin_s: float) -> Flight | None:
        """Takes a batch that the device can begin with at `begin_s`. None if no query waits any more, or the policy failed."""
        pool, backlog, flight = self._pool, self._pool.backlog, None
        if pool.policy_call.thread is not None:
            return None  # the worker woke up for another reason than work
        retry = pool.locked_find_retry(self)
        backlog.prune(now_s)
        # Nothing arrives in a group of retries, so its meter is empty.
        waiting, meter = (backlog.queue, backlog.meter) if retry is None else (retry.waiting, ArrivalMeter())
        if len(waiting):
            if not self.underway.flights:
                self.underway.watched_s = now_s  # `PolicyCall` excuses the time that the policy takes
            try:
                pace = pool.members.fleet.pace(self.index)
                decide = pool.policy_call.locked_asker(self)
                turn = Turn(waiting, meter, self.policy, self.profile, pace, self._last_subnet, self.index, decide)
                row, batch, reason = dispatch.next_batch(turn, begin_s)
            except OutdatedError as outdated:
                pool.outbox.drop(outdated)  # with the error of the policy
            except BaseException as error:  # this is not the main thread, so it cannot be Ctrl-C
                unlucky = waiting.pop(self.sizes[-1])
                pool.counters.failed += sum(not query.done() for query in unlucky)
                pool.outbox.call(pool.policy_call.failed, (error, unlucky))
            else:
                self._last_subnet = row.subnet
                if batch := refill(waiting, self.profile, row, batch, pool.outbox):
                    flight = Flight(row, batch, self._places[len(batch)], retry, reason, now_s)
                    self.underway.flights.append(flight)
        pool.locked_wake_one()
        return flight

    def _launch(self, flight: Flight) -> None:
        """Hands a batch to the device."""
        flight.started_s = self._pool.clock()
        if not flight.shared:
            self.underway.watched_s = flight.started_s
        flight.launch(self.engine, self.sizes[flight.place])

    def compute(self, flight: Flight, blanks: Sequence[Any] = ()) -> list[Any]:
        """The outputs of a batch, or of blank inputs; `flight.failure` is set if there are none."""
        if flight.launched is None and flight.failure is None:
            flight.started_s = self.underway.watched_s = self._pool.clock()
        suspicion = Suspicion(self._pool, self)
        return flight.compute(self.engine, self.sizes[flight.place], self._pool.clock, suspicion, blanks)

    # -- answers ----------------------------------------------------------------------------------------------------------

    def _land(self, flight: Flight, *, slept: bool = False) -> bool:
        """Gets a batch's outputs and answers its queries. False when the worker must leave.

        Args:
          slept: whether the worker slept before this call. The device may then have been done earlier.
        """
        pool, batch, row = self._pool, flight.batch, flight.row
        outputs = self.compute(flight)
        if flight.failure is not None:
            return self.failures.handle(self, flight, flight.failure)
        finish_s, start_s, ready_s = pool.clock(), flight.started_s, flight.ready_s
        self._free_s, self.underway.has_landed = finish_s if ready_s is None else ready_s, True
        self.failures.strikes = 0
        self.batches += 1
        profiled_ms = row.latency_ms[flight.place]
        too_late = slept and flight.waited_s < _AT_ONCE_S
        if self.present and not too_late:  # the index of an absent worker may belong to another one now
            pool.members.fleet.observe(self.index, profiled_ms, 1e3 * flight.took_s(finish_s))
        if ready_s is not None:
            self.overlap_pace.observe_device(1e-3 * profiled_ms, None if too_late else ready_s - start_s)
        # Do as much as possible before the first answer: after it, its client competes for the interpreter.
        slack_s, submitted_s = batch[0].deadline_s - start_s, [query.submitted_s for query in batch]
        about = getattr(self.engine, "class_names", ()), self.profile.compute_dtype
        late, turned_away = futures.answer(batch, outputs, row, start_s, finish_s, *about)
        if turned_away:
            submitted_s = [query.submitted_s for query in batch if query not in turned_away]
        self._answered = (row.subnet, len(batch), submitted_s, late, start_s, finish_s, slack_s, flight.reason)
        flight.batch, flight.launched = (), None  # no lock is held here, and these may be the last references to the queries
        return True

    # -- calls of the pool -------------------------------------------------------------------------------------------

    def locked_succeed(self, successor: "Successor | None") -> None:
        """The worker takes up `successor` before its next batch."""
        self._pool.outbox.drop(self.successor)
        self.successor = successor

    def _locked_take_up(self, successor: "Successor") -> None:
        pool = self._pool
        pool.outbox.drop((self.engine, self.policy))
        self.engine, self.profile, self.policy = successor
        self.successor = self._last_subnet = None
        self.overlaps, self.place = may_overlap(self.engine, pool.options.overlap), place_of(self.engine)
        self.failures.strikes, self.overlap_pace, self.blame.out = 0, OverlapPace(), {}
        pool.changed.notify_all()

    def locked_change(self, profile: Profile, policy: Policy) -> None:
        """Uses another profile of the same engine, with fewer batch sizes or subnets, and the policy for it."""
        self._pool.outbox.drop(self.policy)
        self.profile, self.policy = profile, policy
        if self.alive and self.successor is None:
            self._pool.members.fleet.resize(self.index, profile)

    def locked_retire(self, gone: Gone = "") -> None:
        """The worker takes no more batches. It leaves when its present ones are answered."""
        self.alive = False
        self.gone = gone if gone == "abandoned" else self.gone or gone

    def locked_leave(self, *, hung: bool) -> None:
        """Takes the worker out of service, and gives its batches back."""
        self.present = False
        self.locked_succeed(None)
        self.failures.locked_leave(self, hung=hung)
        if self._pool.policy_call.thread is self.thread:
            self._pool.policy_call.locked_forget()

    def locked_is_stuck(self, now_s: float, excused_s: float) -> bool:
        """Whether the first batch or the policy takes too long. `excused_s` does not count: the process stood still."""
        if (call := self._pool.policy_call).thread is self.thread:
            return call.is_overdue(now_s)
        return self.underway.is_stuck(now_s, stall_s=self._pool.options.stall_s, excused_s=excused_s)

    @property
    def state(self) -> str:
        """What the worker does now, or why it is gone. See `Server.health`."""
        if self.gone:
            return self.gone
        if self.underway.is_answering:
            return "answering"
        if self._pool.policy_call.thread is self.thread:
            return "deciding"
        return "running" if self.underway.flights else "idle"
