"""One worker of a server: its engine, its thread, its batches and its failures. No jax.

One class, because one thread does it all. `server.py` lists threads and locks. Methods `locked_...` need the pool's lock.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

from superserve_jax import foreign
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy
from superserve_jax.serving import futures
from superserve_jax.serving.blame import Blame
from superserve_jax.serving.flight import Failure, Flight, OverlapPace, may_overlap, refill
from superserve_jax.serving.lost import Suspicion
from superserve_jax.serving.policy_call import OutdatedError
from superserve_jax.serving.telemetry import Batch
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
      flights: the batches under way, in the order in which they run. There may be two if the device can compute one while the
        host prepares the next (`engines.base.Overlapping`).
      successor: after a swap, the engine, profile and policy for the next batches.
      alive, present: see `members.Members`.
      gone: why the worker takes no more batches; "" until then.
      batches, failed_batches: how many it answered, and how many failed on it.
      watched_s: since when the first flight may be stuck.
      last_failure: its last error.
    """

    def __init__(self, pool: "Pool", engine: Engine, profile: Profile, policy: Policy, *, name: str, index: int):
        self.engine, self.profile, self.policy = engine, profile, policy
        self.name, self.index = name, index
        self.thread = threading.Thread(target=self._run, name=f"superserve-{name}", daemon=True)
        self.flights: list[Flight] = []
        self.successor: Successor | None = None
        self.alive = self.present = False  # until it joins
        self.gone: Gone = ""
        self._pool, self._sizes = pool, profile.batch_sizes
        self._places = [profile.batch_index(count) for count in range(profile.max_batch + 1)]
        self.overlaps = may_overlap(engine, pool.options.overlap)
        self.overlap_pace = OverlapPace()
        self._last_subnet: Subnet | None = None
        self._landed = False  # the first flight has its outputs, but is still among the flights
        self._in_callbacks = False  # done-callbacks of other queries run in this thread
        self._answered: Batch | None = None  # an answered batch that the counters do not know yet
        self.watched_s = 0.0
        self._free_s = 0.0  # when the device was done with the last batch
        self.batches = self.failed_batches = 0
        self._strikes = 0  # failed batches in a row that were this worker's fault
        self.blame = Blame(pool)
        self.last_failure: Failure | None = None

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
                self.locked_note(failure)
        finally:
            pool.leave([self], "left", pool.members.lost_error)
            del self.engine, self.policy  # their memory is free now, while the health can still be read

    def _turn(self) -> bool:
        """Takes at most one batch, and answers at most one. False when the worker must leave."""
        pool, flight = self._pool, None
        with pool.lock:
            self._locked_settle()
            first = self.flights[0] if self.flights else None
            if first is None:
                if not pool.locked_wait_for_work(self):
                    return False
                if self.successor is not None:  # it came while the worker was idle
                    self._locked_take_up(self.successor)
                now_s = pool.clock()
                flight = self._locked_take(now_s, now_s)
        self._make_calls()
        if first is not None:
            return self._turn_ahead(first)
        if flight is None:
            return True
        if self.overlaps:
            self._launch(flight)
            return True  # the next turn may take another batch, and answers this one
        return self._land(flight)

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
            can = self.alive and self.overlaps and self.successor is None and not self._strikes and first.retry is None
            if can and pool.locked_has_work(self) and pool.locked_find_retry(self) is None:
                now_s = pool.clock()
                flight = self._locked_take(now_s, max(now_s, self.overlap_pace.done_s(first.started_s, profiled_s)))
        self._make_calls()
        if flight is not None:
            first.shared = flight.shared = True
            self._launch(flight)
            self.overlap_pace.observe_host(pool.clock() - max(wake_s, asked_s))
        return self._land(first, slept=slept)

    def _make_calls(self) -> None:
        """Empties the outbox. Slow done-callbacks are not the engine's fault, so their time does not count."""
        outbox, clock = self._pool.outbox, self._pool.clock
        if outbox.entries:
            self._in_callbacks, since_s = True, clock()
            outbox.empty()
            self.watched_s += clock() - since_s
            self._in_callbacks = False

    # -- decisions --------------------------------------------------------------------------------------------------------

    def _locked_settle(self) -> None:
        """Removes the flight that the last turn answered, and counts it. Done only now, since a turn begins with the lock."""
        if self._landed:
            self._landed = False
            del self.flights[:1]  # there is none if the worker has been abandoned meanwhile
            if self.flights:
                self._locked_next_begins(self._free_s, self._pool.clock())
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
            if not self.flights:
                self.watched_s = now_s  # `locked_excuse` adds the time that the policy takes
            try:
                pace = pool.members.fleet.pace(self.index)
                decide = pool.policy_call.locked_asker(self)
                turn = Turn(waiting, meter, self.policy, self.profile, pace, self._last_subnet, self.index, decide)
                row, batch, reason = dispatch.next_batch(turn, begin_s)
            except OutdatedError as outdated:
                pool.outbox.drop(outdated)  # with the error of the policy
            except BaseException as error:  # this is not the main thread, so it cannot be Ctrl-C
                unlucky = waiting.pop(self._sizes[-1])
                pool.counters.failed += sum(not query.done() for query in unlucky)
                pool.outbox.call(pool.policy_call.failed, (error, unlucky))
            else:
                self._last_subnet = row.subnet
                if batch := refill(waiting, self.profile, row, batch, pool.outbox):
                    flight = Flight(row, batch, self._places[len(batch)], retry, reason, now_s)
                    self.flights.append(flight)
        pool.locked_wake_one()
        return flight

    def _launch(self, flight: Flight) -> None:
        """Hands a batch to the device."""
        flight.started_s = self._pool.clock()
        if not flight.shared:
            self.watched_s = flight.started_s
        flight.launch(self.engine, self._sizes[flight.place])

    def _compute(self, flight: Flight, blanks: Sequence[Any] = ()) -> list[Any]:
        """The outputs of a batch, or of blank inputs; `flight.failure` is set if there are none."""
        if flight.launched is None and flight.failure is None:
            flight.started_s = self.watched_s = self._pool.clock()
        suspicion = Suspicion(self._pool, self)
        return flight.compute(self.engine, self._sizes[flight.place], self._pool.clock, suspicion, blanks)

    # -- answers ----------------------------------------------------------------------------------------------------------

    def _land(self, flight: Flight, *, slept: bool = False) -> bool:
        """Gets a batch's outputs and answers its queries. False when the worker must leave.

        Args:
          slept: whether the worker slept before this call. The device may then have been done earlier.
        """
        pool, batch, row = self._pool, flight.batch, flight.row
        outputs = self._compute(flight)
        if flight.failure is not None:
            return self._failed(flight, flight.failure)
        finish_s, start_s, ready_s = pool.clock(), flight.started_s, flight.ready_s
        self._free_s, self._landed = finish_s if ready_s is None else ready_s, True
        self._strikes = 0
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

    # -- failures ---------------------------------------------------------------------------------------------------------

    def _failed(self, flight: Flight, failure: Failure) -> bool:
        """Gives a failed batch back. False when the worker must leave."""
        if failure.lost:
            return self._pool.lost.leave(self, failure)
        pool, size = self._pool, self._sizes[flight.place]
        text, error = f"failed on a batch of {flight.count}: {failure.text}", failure.error if flight.retry is None else None
        foreign.log(_log, logging.WARNING, "%s %s", self.name, text, error=error)
        foreign.forget_frames(failure.error)
        flight.launched = None
        too_large = failure.out_of_memory and (size > self._sizes[0] or flight.shared)
        verdict = self.blame.verdict(self, flight, failure) if failure.not_finite else None  # else after the retry
        smaller = None
        if too_large and not flight.shared:
            profile = self.profile.at([b for b in self._sizes if b <= size // 2] or self._sizes[:1])
            smaller = profile, pool.make_policy(profile)
        with pool.lock:
            self.failed_batches += 1
            self.locked_note(failure)
            pool.members.failures += 1
            pool.idle.wake_all()  # not every worker may run a retry
            if flight in self.flights:  # else the worker was abandoned, which gave its batches back
                self.flights.remove(flight)
                now_s = pool.clock()
                self._locked_next_begins(now_s, now_s)
                if smaller is not None:
                    self.locked_change(*smaller)
                if too_large:  # two batches at once, or one of this size, need too much memory
                    self.overlaps = not flight.shared and may_overlap(self.engine, pool.options.overlap)
                if too_large or verdict == "give back":
                    pool.backlog.give_back(flight, self.index)
                else:
                    pool.locked_retry(self, flight, failure)
        self._make_calls()
        if too_large or not self.alive:
            return self.alive or bool(self.flights)
        if (verdict or self.blame.verdict(self, flight, failure)) != "strike":
            self._strikes = 0
            return True
        self._strikes += 1
        if self._strikes >= pool.options.max_failures:
            return False
        if pool.members.alive > 1 and not self.flights:
            # A broken device fails at once and is free again. Without a pause it would take most of the batches.
            pool.pause(self, pool.pause_s * self._strikes)
        return True

    def run_blanks(self, row: Row, place: int, blanks: Sequence[Any]) -> Failure | None:
        """Runs inputs of zeros, and returns the failure. None also if the worker is to leave."""
        pool = self._pool
        blank = Flight(row, (), place, None, "", pool.clock())  # the watchdog must see it, since it may hang
        with pool.lock:
            if not self.alive:
                return None
            self.flights.insert(0, blank)
            self.watched_s = blank.started_s
        self._compute(blank, blanks)
        with pool.lock:
            if blank in self.flights:
                self.flights.remove(blank)
            self._locked_next_begins(-math.inf, pool.clock())  # -inf: the next flight began before the blank inputs
        return blank.failure

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
        self.overlaps = may_overlap(self.engine, pool.options.overlap)
        self._strikes, self.overlap_pace, self.blame.out = 0, OverlapPace(), {}
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
        """Takes the worker out of service, and gives its batches back.

        Only the batch that the worker was handing over, waiting for or answering counts as failed. One behind it never began,
        and goes back to where it came from. Either may have killed a lost process, so both are tried again.
        """
        pool, now_s = self._pool, self._pool.clock()
        self.present = False
        self.locked_succeed(None)
        in_policy = pool.policy_call.thread is self.thread
        if hung:
            ran_s = pool.policy_call.ran_s(now_s) if in_policy else now_s - self.watched_s if self.flights else 0.0
            what = f"the policy, called by {self.name}," if in_policy else self.name
            self.locked_note(Failure.of(TimeoutError(f"{what} has not returned for {ran_s:.3g} s")))
        if in_policy:
            pool.policy_call.locked_forget()
        flights, self.flights = self.flights, []
        busy = next((flight for flight in flights if flight.launched is flight.failure is None), None)
        if busy is None and flights and ((hung and not in_policy) or self._landed):
            busy = flights[0]
        for flight in flights:
            if (flight is busy or self.gone == "lost") and self.last_failure is not None:
                pool.locked_retry(self, flight, self.last_failure, hung=hung)
            else:
                pool.backlog.give_back(flight, self.index)

    def locked_excuse(self, seconds: float) -> None:
        """Does not count a time against the engine."""
        self.watched_s += seconds

    def locked_is_stuck(self, now_s: float, excused_s: float) -> bool:
        """Whether the first flight or the policy takes too long. `excused_s` does not count: the process stood still."""
        if (call := self._pool.policy_call).thread is self.thread:
            return call.is_overdue(now_s)
        if not self.flights or self._landed or self._in_callbacks:  # the thread is in done-callbacks, not in the engine
            return False
        if excused_s:
            self.watched_s = min(self.watched_s + excused_s, now_s)
        return now_s - self.watched_s > self.flights[0].patience_s(self._pool.options.stall_s)

    @property
    def state(self) -> str:
        """What the worker does now, or why it is gone. See `Server.health`."""
        if self.gone:
            return self.gone
        if self._landed or self._in_callbacks:
            return "answering"
        return "deciding" if self._pool.policy_call.thread is self.thread else "running" if self.flights else "idle"

    def locked_note(self, failure: Failure) -> None:
        """Remembers a failure as the last one."""
        self._pool.outbox.drop(self.last_failure)
        self.last_failure = failure
        self._pool.members.note(failure)

    def _locked_next_begins(self, since_s: float, now_s: float) -> None:
        """Notes that the device works on the next flight, not earlier than `since_s`. Its time limit starts at `now_s`."""
        self.watched_s = now_s
        for flight in self.flights:
            flight.started_s = max(flight.started_s, since_s)
