"""Swaps: how the workers of a pool get the engines of another export. No jax.

`Server.swap` describes the steps. Each worker gets a `Successor`, and takes it up between two batches.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from superserve_jax import errors, foreign
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.scheduling import dispatch, length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.worker import Worker


class Successor(NamedTuple):
    """The engine, profile and policy that a worker uses after a swap. It changes to them between two batches."""

    engine: Engine
    profile: Profile
    policy: Policy

    def try_policy(self, *, worker: int, now_s: float) -> BaseException | None:
        """Asks the policy about one query of each length. Returns its error, or None."""
        for length in self.profile.lengths or (0,):
            waiting = length_queue.make_queue(self.profile)
            waiting.push(now_s + 1.0, None, length=length)
            try:
                dispatch.next_batch(Turn(waiting, ArrivalMeter(), self.policy, self.profile, worker=worker), now_s)
            except BaseException as error:
                if foreign.is_interrupt(error):
                    raise
                return error
        return None


class Swaps:
    """Swaps the engines of one pool.

    Args:
      pool: the pool.
    """

    def __init__(self, pool: "Pool"):
        self._pool = pool

    def swappable(self) -> "tuple[Worker, ...]":
        """The workers to swap: all that are alive.

        Raises ServerClosedError, WorkersLostError; ConfigError in a thread of this pool.
        """
        pool = self._pool
        pool.process.refuse_fork()
        with pool.lock:
            if pool.is_own_thread():
                raise errors.ConfigError(
                    "a swap in a done-callback would wait for the worker that runs the callback; call it in another thread"
                )
            pool.locked_check_serving("cannot be swapped")
            workers = tuple(worker for worker in pool.members.workers if worker.alive)
            if not workers:  # all are lost, and may come back
                raise pool.members.lost_error()
            return workers

    def swap(self, workers: "Sequence[Worker]", engines: Sequence[Engine], profiles: Sequence[Profile]) -> list[Engine]:
        """Gives each of `workers` that is still alive a successor, or raises and changes nothing.

        All decisions from now on are for the new engines. A running batch ends on its old engine.

        Args:
          workers: the result of `swappable`. No worker has joined since.
          engines, profiles: one for each worker, with the same inputs, batch sizes and length buckets as before.

        Returns:
          The old engines. They are in use until `wait` returns.

        Raises:
          ConfigError: the policy fails with a profile. ServerClosedError, WorkersLostError.
        """
        pool = self._pool
        make_policy = functools.lru_cache(pool.make_policy.__wrapped__)  # a new cache, or it would grow with every swap
        new = [Successor(e, p, make_policy(p)) for e, p in zip(engines, profiles, strict=True)]
        if (failed := self._try_policies(workers, new)) is not None:
            raise errors.ConfigError(
                f"the server's policy fails with the profile of the new export: {foreign.text_of(failed)}; give the policy by "
                "name, or use one that makes new tables for every profile (see policies.ByProfile)"
            ) from failed
        with pool.lock:
            pool.locked_check_serving("cannot be swapped")
            successors = {worker: s for worker, s in zip(workers, new, strict=True) if worker.alive}
            if not successors:
                raise pool.members.lost_error()
            old = [worker.engine for worker in successors]
            pool.outbox.drop(pool.make_policy)
            pool.make_policy = make_policy
            new_profiles = [successor.profile for successor in successors.values()]
            pool.members.succeed(successors, new_profiles[0])
            pool.counters.swap(new_profiles)
            pool.backlog.retime(new_profiles[0])
            pool.locked_offer()
            pool.locked_notify_all()  # idle workers change over, too
        pool.outbox.empty()
        return old

    def wait(self) -> None:
        """Returns when every worker runs its successor, or is gone."""
        pool = self._pool
        with pool.lock:
            pool.changed.wait_for(lambda: not any(worker.successor for worker in pool.members.workers))

    def _try_policies(self, workers: "Sequence[Worker]", successors: Sequence[Successor]) -> BaseException | None:
        """Asks the policy about each new profile. Returns its first error, or None.

        Only a policy object is the same as before. A policy that was given by name is new, and need not be tried.
        """
        pool = self._pool
        with pool.lock:
            pool.locked_check_serving("cannot be swapped")
            pairs = zip(workers, successors, strict=True)
            same = [(worker.index, s) for worker, s in pairs if worker.alive and s.policy is worker.policy]
        if not same:
            return None
        with pool.policy_call.alone():
            return next(filter(None, (s.try_policy(worker=i, now_s=pool.clock()) for i, s in same)), None)
