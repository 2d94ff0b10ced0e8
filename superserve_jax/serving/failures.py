"""What follows when a worker's engine fails. No jax.

1. The engine is lost: the worker leaves at once (`lost.py`).
2. The device is out of memory: the batches of this worker become smaller. Nobody is at fault.
3. Otherwise the queries run again, in groups (`retries.py`), and `blame.py` finds what is at fault. If it is the device, the
   worker gets a **strike**. A batch without one removes the strikes. The worker pauses after each strike, and leaves after
   `max_failures` of them.
4. The engine or the policy hangs: the watchdog abandons the worker. Its batches run again on other workers.

A worker whose engine is in another process may come back after 1 and 4.
"""

import logging
from typing import TYPE_CHECKING, final

from superserve_jax import foreign
from superserve_jax.serving.flight import Failure, Flight, may_overlap

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.worker import Worker

_log = logging.getLogger(__name__)


@final
class Failures:
    """The failures of one worker, and what follows from each. Methods `locked_...` need the pool's lock.

    Args:
      pool: the pool. There is no reference to the worker, so that its engine is free as soon as it has left.

    Attributes:
      count: how many batches have failed.
      strikes: how many strikes the worker has got in a row. Its own thread writes them.
      last: the last error.
    """

    def __init__(self, pool: "Pool"):
        self._pool = pool
        self.count = self.strikes = 0
        self.last: Failure | None = None

    def locked_note(self, failure: Failure) -> None:
        """Remembers a failure as the last one."""
        self._pool.outbox.drop(self.last)
        self.last = failure
        self._pool.members.note(failure)

    def handle(self, worker: "Worker", flight: Flight, failure: Failure) -> bool:
        """Gives a failed batch back. False when the worker must leave. The worker's thread calls this, without the lock."""
        if failure.lost:
            return self._lost(worker, failure)
        text, error = f"failed on a batch of {flight.count}: {failure.text}", failure.error if flight.retry is None else None
        foreign.log(_log, logging.WARNING, "%s %s", worker.name, text, error=error)
        foreign.forget_frames(failure.error)
        flight.launched = None
        if failure.out_of_memory and (flight.place > 0 or flight.shared):
            return self._too_large(worker, flight, failure)
        return self._try_again(worker, flight, failure)

    def _lost(self, worker: "Worker", failure: Failure) -> bool:
        """Takes the worker out of service, and its batches run elsewhere. Returns False: it must leave."""
        pool = self._pool
        foreign.log(_log, logging.WARNING, "%s is lost: %s", worker.name, failure.text)
        foreign.forget_frames(failure.error)
        with pool.lock:
            self.locked_note(failure)
        pool.leave([worker], "lost", pool.members.lost_error)
        return False

    def _too_large(self, worker: "Worker", flight: Flight, failure: Failure) -> bool:
        """Two batches at once, or one of this size, need too much memory. So the worker runs one at once, or smaller ones."""
        pool, smaller = self._pool, None
        if not flight.shared:
            half = worker.sizes[flight.place] // 2
            profile = worker.profile.at([size for size in worker.sizes if size <= half] or worker.sizes[:1])
            smaller = profile, pool.make_policy(profile)
        with pool.lock:
            if self._locked_count(worker, flight, failure):
                if smaller is not None:
                    worker.locked_change(*smaller)
                worker.overlaps = not flight.shared and may_overlap(worker.engine, pool.options.overlap)
                pool.backlog.give_back(flight, worker.index)
        worker.make_calls()
        return worker.alive or bool(worker.underway.flights)

    def _try_again(self, worker: "Worker", flight: Flight, failure: Failure) -> bool:
        """Puts the queries into a group of retries, and finds out whether this is a strike."""
        pool = self._pool
        # If a subnet is at fault, its batch does not count as failed. This must be known before. Else the queries go first.
        verdict = worker.blame.verdict(worker, flight, failure) if failure.not_finite else None
        with pool.lock:
            if self._locked_count(worker, flight, failure):
                if verdict == "give back":
                    pool.backlog.give_back(flight, worker.index)
                else:
                    pool.locked_retry(worker, flight, failure)
        worker.make_calls()
        if not worker.alive:
            return bool(worker.underway.flights)
        if (verdict or worker.blame.verdict(worker, flight, failure)) != "strike":
            self.strikes = 0
            return True
        self.strikes += 1
        if self.strikes >= pool.options.max_failures:
            return False
        if pool.members.alive > 1 and not worker.underway.flights:
            # A broken device fails at once and is free again. Without a pause it would take most of the batches.
            with pool.lock:
                pool.changed.wait_for(lambda: pool.closing or not worker.alive, pool.pause_s * self.strikes)
        return True

    def locked_leave(self, worker: "Worker", *, hung: bool) -> None:
        """Gives back the batches of a worker that leaves, or that hangs.

        Only the batch that the worker was handing over, waiting for or answering counts as failed. One behind it never began,
        and goes back to where it came from. Either may have killed a lost process, so both are tried again.
        """
        pool = self._pool
        in_policy = pool.policy_call.thread is worker.thread
        if hung:
            ran_s = (pool.policy_call if in_policy else worker.underway).ran_s(pool.clock())
            what = f"the policy, called by {worker.name}," if in_policy else worker.name
            self.locked_note(Failure.of(TimeoutError(f"{what} has not returned for {ran_s:.3g} s")))
        flights, busy = worker.underway.take_all(hung=hung and not in_policy)
        for flight in flights:
            if (flight is busy or worker.gone == "lost") and self.last is not None:
                pool.locked_retry(worker, flight, self.last, hung=hung)
            else:
                pool.backlog.give_back(flight, worker.index)

    def _locked_count(self, worker: "Worker", flight: Flight, failure: Failure) -> bool:
        """Counts a failed batch, and removes it. False if the worker was abandoned, which gave its batches back."""
        pool = self._pool
        self.count += 1
        self.locked_note(failure)
        pool.members.failures += 1
        pool.idle.wake_all()  # not every worker may run a retry
        now_s = pool.clock()
        return worker.underway.remove(flight, free_s=now_s, now_s=now_s)
