"""How all workers change over to other engines at once, between two batches. No jax.

`Swapping` is the part of `workers.Pool` that `Server.swap` needs. Under the pool's lock every worker that is alive gets a
successor: engine, profile and the policy for it. It takes that up before it decides about its next batch, so whatever is
decided from then on is by the new ones; a batch that runs meanwhile ends on the engine that it was decided for, and fails or
is given back by the rules of that one. Methods named `_locked_...` expect the caller to hold the lock.
"""

import functools
import threading
from collections.abc import Sequence

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.scheduling import dispatch, length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.serving.crew import Crew
from superserve_jax.serving.roster import Successor, Worker


class Swapping(Crew):
    """A crew whose engines can be swapped."""

    def members(self) -> list[Worker]:
        """The workers that a swap is for: those alive.

        Raises ServerClosedError, WorkersLostError; ConfigError in a worker's own thread.
        """
        self._check_process()
        with self._lock:
            if threading.current_thread() in (self._watchdog, *(w.thread for w in self._workers)):
                raise errors.ConfigError(
                    "a swap in a done-callback would keep the worker that it runs in waiting; call it in another thread"
                )
            return self._locked_alive()

    def swap(self, workers: Sequence[Worker], engines: Sequence[Engine], profiles: Sequence[Profile]) -> list[Engine]:
        """Gives each of `workers` that is still alive a successor, or raises and changes nothing.

        Args:
          workers: all that were alive when `members` was asked; none has joined since.
          engines, profiles: one for each, for the same inputs, batch sizes and length buckets as before.

        Returns:
          The engines that go. They are in use until `wait_for_swap` returns, and their memory goes with this list.

        Raises:
          ConfigError: the policy can do nothing with a profile. ServerClosedError, WorkersLostError.
        """
        make_policy = functools.cache(self._make_policy.__wrapped__)  # anew, or it would grow with every swap
        new = [Successor(e, p, make_policy(p)) for e, p in zip(engines, profiles, strict=True)]
        with self._lock:
            alive = self._locked_alive()
            pairs = [(worker, successor) for worker, successor in zip(workers, new, strict=True) if worker in alive]
            for worker, successor in pairs:
                if successor.policy is worker.policy:  # it was not made for this profile
                    self._locked_try(successor.policy, successor.profile, worker.index)
            old = [worker.engine for worker, _ in pairs]
            self._make_policy = make_policy
            self._locked_swap(pairs)
            refused = self._locked_refuse()
            self._work.notify_all()  # also who is idle holds an engine
        for query, error in refused:
            query.set_exception(error)
        return old

    def wait_for_swap(self) -> None:
        """Returns when every worker runs its successor, or is gone."""
        with self._lock:
            self._left.wait_for(lambda: not any(w.successor for w in self._workers))

    def _locked_alive(self) -> list[Worker]:
        if self._closing.is_set():
            raise errors.ServerClosedError("the server is closed and cannot be swapped; open a new one")
        if not self._alive:
            raise self._lost_error()
        return [w for w in self._workers if w.alive]

    def _locked_try(self, policy: Policy, profile: Profile, worker: int) -> None:
        """Asks a policy about one query of each length with a second of slack. Raises ConfigError where that fails."""
        now_s = self._clock()
        for length in profile.lengths or (0,):
            waiting = length_queue.make_queue(profile)
            waiting.push(now_s + 1.0, None, length=length)
            try:
                dispatch.next_batch(Turn(waiting, ArrivalMeter(), policy, profile, worker=worker), now_s)
            except Exception as error:
                raise errors.ConfigError(
                    f"the server's policy cannot do with the profile of what it is to change over to: {error!r}; give the "
                    "policy by name, or one that makes its tables anew for every profile (see policies.ByProfile)"
                ) from error

    def _locked_swap(self, pairs: Sequence[tuple[Worker, Successor]]) -> None:
        fleet = Fleet(correct=self._follow_drift)
        successors = dict(pairs)
        for worker in sorted(self._workers, key=lambda w: w.present):  # the index of one that is gone may be another's
            worker.successor = successor = successors.get(worker)  # none of one that has been removed and finishes its batch
            # The first to join sets the unit, which is to be the new profile's, also where that worker is gone.
            fleet.join(worker.index, (successor or pairs[0][1]).profile)
            if not successor:
                fleet.leave(worker.index)
        self._locked_recount()
        self._fleet = fleet  # only now, since workers tell it without the lock how long their batches took
        profile = pairs[0][1].profile
        pushed = self._queue.pushed
        self._queue.retime(profile)
        if pushed:
            self._meter.rescale(self._queue.pushed / pushed)
        self._retries.retime(profile)
        self._counters.swap(profile)
        for _, successor in pairs:
            self._counters.know(successor.profile)

    def _locked_take_up(self, worker: Worker, successor: Successor) -> None:
        """What a worker does with its successor, in its own thread and between two batches."""
        worker.engine, worker.profile, worker.policy = successor
        worker.successor = worker.last_subnet = None
        worker.overlap = self._overlaps(worker.engine)
        worker.failures = 0
        self._left.notify_all()
