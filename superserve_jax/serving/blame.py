"""Which is at fault when a batch fails: an input, the subnet, or the device. No jax.

The worker runs blank inputs, which are zeros.

1. If the subnet of the batch can run them, an input is at fault. `retries` finds out which.
2. Otherwise, if the outputs were NaN or infinite, the worker tries some other subnets, the fastest first. If one of them
   gives finite outputs, the subnet is at fault. The worker takes it **out of service**, and gives the batch back.
3. Otherwise the device is at fault.

A subnet stays out of service on a worker until the next swap. The worker's profile no longer has it, and a policy that was
given by name is made again for this profile. If a policy object still chooses the subnet, the next less accurate one runs.

A policy that is fixed to one subnet cannot do without it, and keeps it. If another live worker may still run the subnet, the
device is at fault. If none may, queries fail at once. Their error names subnet and cause. A subnet that ran instead, because
of a query's floor, is taken out of service as usual.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from superserve_jax import errors, foreign
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision, Fixed, Policy, State
from superserve_jax.serving.flight import Failure, Flight
from superserve_jax.subnet import Subnet

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.worker import Worker

_log = logging.getLogger(__name__)

_TRIED = 10  # other subnets; the fastest ones share the fewest weights with the bad one

Verdict = Literal["retry", "give back", "strike"]
"""What follows from a failed batch. "retry": it counts as failed, but not against the worker. "give back": it does not count
as failed. "strike": it counts as failed, and against the worker."""


class Cause(NamedTuple):
    """Why a subnet is out of service: its row in the profile, and the text of the error."""

    row: Row
    text: str


class Blame:
    """Finds what is at fault, and keeps the subnets that are out of service, for one worker.

    Args:
      pool: the pool. There is no reference to the worker, so that its engine is free as soon as it has left.

    Attributes:
      out: the subnets that are out of service. It is replaced, never changed, under the pool's lock.
    """

    def __init__(self, pool: "Pool"):
        policy = pool.options.policy
        self._fixed = isinstance(policy, Fixed) or (
            isinstance(policy, str) and policy.startswith(("fixed:", "least-accurate"))
        )
        self._pool = pool
        self.out: dict[Subnet, Cause] = {}

    def verdict(self, worker: "Worker", flight: Flight, failure: Failure) -> Verdict:
        """What follows from a failed batch. The worker calls it without the lock."""
        subnet, kept = flight.row.subnet, self._fixed and flight.reason != "floor"
        if subnet not in self.out:
            blanks = [_blank(worker.engine, query.inputs) for query in flight.batch]
            again = self._run_blanks(worker, flight.row, flight.place, blanks)
            if again is None or again.lost:  # the next batch finds out that the engine is lost
                return "retry"
            foreign.log(_log, logging.WARNING, "%s fails on blank inputs, too: %s", worker.name, again.text)
            if not (failure.not_finite and again.not_finite and self._any_other_works(worker, subnet, blanks[:1])):
                return "strike"
            self._take_out(worker, Cause(flight.row, failure.text), kept=kept)
        if not kept:
            return "give back"
        return "strike" if self._some_worker_may_run(subnet) else "retry"

    def _any_other_works(self, worker: "Worker", subnet: Subnet, blanks: list[np.ndarray]) -> bool:
        others = (row for row in worker.profile.rows if row.subnet != subnet and row.subnet not in self.out)
        for row in sorted(others, key=lambda row: row.latency_ms[0])[:_TRIED]:
            if self._run_blanks(worker, row, 0, blanks) is None:
                return True
        return False

    def _run_blanks(self, worker: "Worker", row: Row, place: int, blanks: Sequence[np.ndarray]) -> Failure | None:
        """Runs inputs of zeros, and returns the failure. None also if the worker is to leave."""
        pool, underway = self._pool, worker.underway
        blank = Flight(row, (), place, None, "", pool.clock())  # the watchdog must see it, since it may hang
        with pool.lock:
            if not worker.alive:
                return None
            underway.flights.insert(0, blank)
            underway.watched_s = blank.started_s
        worker.compute(blank, blanks)
        with pool.lock:
            underway.remove(blank, free_s=-math.inf, now_s=pool.clock())  # the next flight began before the blank inputs
        return blank.failure

    def _take_out(self, worker: "Worker", cause: Cause, *, kept: bool) -> None:
        """Takes a subnet out of service, unless the worker has left or changes to another export."""
        pool, out = self._pool, {**self.out, cause.row.subnet: cause}
        changed = None
        if not kept:  # for a fixed policy, the subnet has a higher accuracy, so the name "fixed:<i>" still fits
            profile = worker.profile.only(row.subnet for row in worker.profile.rows if row.subnet != cause.row.subnet)
            changed = profile, pool.make_policy(profile)
        with pool.lock:
            if not worker.alive or worker.successor is not None:
                return
            self.out = out
            if changed is not None:
                worker.locked_change(*changed)
                pool.locked_offer()
        pool.outbox.empty()
        where, subnet = worker.name, cause.row.subnet.to_json()
        message = "subnet %s is out of service on %s, where other subnets work: %s; calibrate and export it again, and swap"
        foreign.log(_log, logging.ERROR, message, subnet, where, cause.text)

    def _some_worker_may_run(self, subnet: Subnet) -> bool:
        return any(worker.alive and subnet not in worker.blame.out for worker in self._pool.members.workers)

    # -- decisions --------------------------------------------------------------------------------------------------------

    def asker(self, decide: Callable[..., Any]) -> Callable[..., Any]:
        """A function like `decide` (see `dispatch.decide`) that never decides for a subnet that is out of service."""

        def ask(policy: Policy, profile: Profile, state: State) -> Any:
            served = functools.partial(self._decide, policy)
            functools.update_wrapper(served, policy, assigned=(), updated=())  # an error names the policy
            return decide(served, profile, state)

        return ask

    def _decide(self, policy: Policy, profile: Profile, state: State) -> Decision:
        decision = policy(profile, state)
        cause = self.out.get(decision.subnet)
        if cause is None:
            return decision
        if not self._fixed:
            less = [row for row in profile.rows if row.accuracy <= cause.row.accuracy]
            chosen = (less or profile.rows)[-1 if less else 0]
            return Decision(chosen.subnet, decision.batch, decision.defer_ms, decision.reason)
        if self._some_worker_may_run(decision.subnet):
            return decision
        raise errors.InferenceError(
            f"subnet {decision.subnet.to_json()} is out of service, and the policy takes no other: {cause.text}; swap to a "
            "repaired export, or open the server with another policy"
        )

    def health(self) -> list[dict[str, Any]]:
        """The subnets that are out of service, for `Server.health`."""
        return [
            {"subnet": cause.row.subnet.to_json(), "accuracy": cause.row.accuracy, "cause": cause.text}
            for cause in self.out.values()
        ]


def _blank(engine: Engine, x: np.ndarray) -> np.ndarray:
    """An input of zeros. `x` may be an image file, which zeros are not."""
    shape = x.shape if x.ndim == len(engine.input_shape) else engine.input_shape
    return np.zeros(shape, engine.input_dtype)
