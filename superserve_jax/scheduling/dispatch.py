"""What happens when a worker is free: the policy is asked, and the batch is taken. Server and simulator share it. No jax.

With length buckets the policy is asked about the head's: with the profile at that length, and with what waits and arrives in
units of the head's work (see `padding`). Where workers are not equally fast, it is asked with the profile of the one that is
free, and with what a worker that is slower than its profile makes of time (see `drift`).
"""

import math
import operator
from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.policies import Policy, State
from superserve_jax.scheduling.queue import DeadlineQueue
from superserve_jax.scheduling.speeds import Pace
from superserve_jax.subnet import Subnet


def next_batch(
    waiting: DeadlineQueue,
    meter: ArrivalMeter,
    policy: Policy,
    profile: Profile,
    now_s: float,
    *,
    pace: Pace,
    last_subnet: Subnet | None,
    worker: int,
) -> tuple[Row, list[Any], float, str]:
    """The row to run, its batch, taken from the queue, the milliseconds for which its subnet is loaded before, and the reason.

    The row is of the profile at the batch's length bucket, the reason one of `policies.REASONS` or the policy's own.

    Args:
      waiting: the queue, not empty.
      meter: of its arrivals.
      policy: for `profile`.
      profile: of the asking worker.
      now_s: the time.
      pace: the asking worker's and the others' speed.
      last_subnet, worker: what the asking worker ran last, and its number.

    Raises:
      ConfigError, ProfileError: the decision is of no query, or of a subnet that the profile does not have. Then, as with
        whatever the policy raises, nothing has been taken.
    """
    waiting.look(now_s)
    aside = None
    try:
        while True:
            length = waiting.head_length
            table = profile.at_length(length) if length else profile
            max_batch = table.batch_sizes[-1]
            state = _state(waiting, meter, max_batch, now_s, pace=pace, last_subnet=last_subnet, worker=worker)
            chosen, size, loading_ms, lost_ms, reason = _decide(policy, table, state)
            defer_before_s = -math.inf
            if lost_ms > -math.inf:
                # What is lost to this worker is not lost as long as the fastest can save it, and is left to that one.
                defer_before_s = now_s + 1e-3 * lost_ms * pace.slowdown / pace.lead
                if pace.lead > 1 and aside is None:
                    waiting.defer(defer_before_s)
                    aside = waiting.set_aside(now_s + 1e-3 * lost_ms * pace.slowdown)
                    if len(waiting):
                        continue
                    waiting.put_back(aside)
                    aside = ()
                if length:
                    waiting.defer(defer_before_s)
                    if waiting.head_length != length:
                        continue  # the decision was for a head that has stepped back, and there is one of another length
            size = min(size, max_batch, state.waiting)
            row, items = queue.take(waiting, table, chosen, size, slack_ms=state.slack_ms, defer_before_s=defer_before_s)
            if loading_ms and row.subnet == last_subnet:  # comparing subnets takes long
                loading_ms = 0.0
            return row, items, loading_ms, reason if row is chosen else "floor"
    finally:
        if aside:
            waiting.put_back(aside)


def _decide(policy: Policy, table: Profile, state: State) -> tuple[Row, int, float, float, str]:
    """Row, batch size, the milliseconds of loading and of slack below which a query is lost, and the policy's reason."""
    try:
        decision = policy(table, state)
        row, size = table.row(decision.subnet), operator.index(decision.batch)  # a NaN would take nothing, for ever
        if size < 1:
            raise errors.ConfigError(f"a decision needs a batch of at least 1, got {size}")
        return row, size, decision.loading_ms, decision.defer_ms, decision.reason
    except Exception as error:
        error.add_note(f"the policy was asked in {state!r}")
        raise


def _state(
    waiting: DeadlineQueue,
    meter: ArrivalMeter,
    max_batch: int,
    now_s: float,
    *,
    pace: Pace,
    last_subnet: Subnet | None,
    worker: int,
) -> State:
    """What the policy may know. On a device that is f times slower than its profile, time runs f times faster."""
    slack_ms = 1e3 * (waiting.head_deadline_s - now_s)
    work_ms = waiting.work_ms
    rate, variance = meter.read(now_s, waiting.pushed, waiting.unit)
    workers, slowdown, _ = pace
    slo_ms = meter.slo_ms
    return State._make(
        (
            now_s,
            slack_ms / slowdown,
            waiting.riders,
            waiting.head_floors(max_batch),
            workers,
            last_subnet,
            waiting.late,
            rate / work_ms * slowdown,
            variance / work_ms**2 * slowdown,
            slo_ms / slowdown,
            waiting.due_by(now_s + 1e-3 * max(2 * slack_ms, slo_ms)),
            worker,
        )
    )
