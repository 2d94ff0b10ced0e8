"""What happens when a worker is free: `next_batch` asks the policy and takes a batch from the queue. No jax.

Server and simulator pass a `Turn`, which holds everything that the decision needs. `next_batch` answers three questions:

    which head      `choose_head` of the queue: usually the earliest deadline. The head determines the batch's length bucket.
    which decision  `decide`: the policy's answer for this head, checked.
    which batch     `take`: the queries that run, and the profile's row of the subnet that runs them.
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

from superserve_jax import errors, foreign
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.length_queue import Queue
from superserve_jax.scheduling.policies import Policy, State, custom
from superserve_jax.scheduling.speeds import EVEN_PACE, Pace
from superserve_jax.subnet import Subnet

_NONE_YET = object()

Decide = Callable[[Policy, Profile, State], tuple[Row, int, float, str]]
"""`decide`, or a function that calls it."""


def decide(policy: Policy, profile: Profile, state: State) -> tuple[Row, int, float, str]:
    """The policy's decision, checked: row, batch size, `defer_ms`, reason. No other code here runs code of the policy.

    Raises PolicyError if the policy raises or decides something else than a `Decision` for this profile. Only a
    KeyboardInterrupt passes unchanged.
    """
    decision: Any = _NONE_YET
    try:
        decision = policy(profile, state)
        row, size = profile.row(decision.subnet), operator.index(decision.batch)  # index: `NaN < 1` is False
        if size >= 1:
            return row, size, float(decision.defer_ms), decision.reason
        raise ValueError(f"a batch of {size}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raised = decision is _NONE_YET
        why = foreign.text_of(error) if raised else _mistake(decision, profile, error)
        place = foreign.place(error) if raised else ""
        raise _refusal(policy, why, place, state) from error  # a local variable for it would make a reference cycle


def _refusal(policy: Policy, why: str, place: str, state: State) -> errors.PolicyError:
    name, definition = custom.name_and_place(policy)
    asked = f"slack_ms={state.slack_ms:.1f}, waiting={state.waiting}"
    refusal = errors.PolicyError(f"the policy '{name}' failed: {why}{place or definition}; fix it (it was asked with {asked})")
    refusal.add_note(f"the policy was called with {state!r}")
    return refusal


def _mistake(decision: Any, profile: Profile, error: BaseException) -> str:
    """What is wrong with a decision, in words. `error` is the error that it led to."""
    try:
        subnet, batch, defer_ms = decision.subnet, decision.batch, decision.defer_ms
    except Exception:  # any exception: the attributes are the user's
        return f"it returned {foreign.text_of(decision)}; a policy returns Decision(subnet, batch)"
    if not isinstance(subnet, Subnet) or subnet not in [row.subnet for row in profile.rows]:
        served = f"which is not in the profile of {len(profile.rows)} subnets; take `row.subnet` of one of `profile.rows`"
        return f"it chose the subnet {foreign.text_of(subnet)}, {served}"
    try:
        whole = operator.index(batch) >= 1
    except Exception:  # as above
        whole = False
    if not whole:
        return f"the batch of a decision is a whole number from 1 up, got {foreign.text_of(batch)}"
    return f"defer_ms is a number of milliseconds, got {foreign.text_of(defer_ms)} ({foreign.text_of(error)})"


@dataclasses.dataclass(slots=True)
class Turn:
    """The inputs of one decision of `next_batch`. A worker may keep its turn and change the fields between two decisions.

    Args:
      queue: the waiting queries, at least one.
      arrivals: the meter of this queue's arrivals.
      policy: a policy for `profile`.
      profile: the profile of the asking worker.
      pace: the speed of the asking worker, compared with its profile and with the other workers.
      last_subnet: the subnet that the asking worker ran last, None at first.
      worker: number of the asking worker, from 0.
      decide: `decide`, or a function that calls it. Meanwhile other threads may add items to the queue, or take items out.
    """

    queue: Queue
    arrivals: ArrivalMeter
    policy: Policy
    profile: Profile
    pace: Pace = EVEN_PACE
    last_subnet: Subnet | None = None
    worker: int = 0
    decide: Decide = decide


def next_batch(turn: Turn, now_s: float) -> tuple[Row, list[Any], str]:
    """Decide about one batch, and take it from the queue. Return the row to run, the items, and the reason.

    There are no items if other threads emptied the queue during the decision.

    The row is from the profile at the batch's length bucket. The reason is one of `policies.REASONS` or the policy's own word.

    A decision may say which queries this worker cannot save (`Decision.defer_ms`). Queries that no worker can save are
    deferred. Queries that only a faster worker can save are set aside while this worker decides about the others. If there
    are no others, this worker takes them.

    Args:
      turn: what the decision needs.
      now_s: the time at which the batch will start.

    Raises:
      PolicyError: see `decide`. ProfileError: see `take`. In both cases no item has been taken.
    """
    queue = turn.queue
    left_s = -math.inf  # queries due before this time are left to faster workers
    while True:
        aside = queue.set_aside(left_s) if left_s > -math.inf else None
        try:
            length = queue.choose_head(now_s)
            profile = turn.profile.at_length(length) if length else turn.profile
            state = _state(turn, profile, now_s)
        finally:
            if aside is not None:
                queue.put_back(aside)
        row, size, lost_ms, reason = turn.decide(turn.policy, profile, state)  # during it, the queue is complete
        if not len(queue):
            return row, [], reason
        aside = queue.set_aside(left_s) if left_s > -math.inf else None
        try:
            if not len(queue):
                left_s = -math.inf
                continue
            if lost_ms > -math.inf:
                _, slowdown, lead = turn.pace
                lost_s = 1e-3 * lost_ms * slowdown
                queue.defer(now_s + lost_s / lead)  # not even the fastest worker can save these
                if lead > 1 and aside is None and _any_besides(queue, now_s + lost_s):
                    left_s = now_s + lost_s
                    continue
            if queue.head_length != length:
                continue  # the head was deferred, or an earlier query came; the new head needs another length bucket
            size = min(size, profile.batch_sizes[-1], state.waiting)
            taken_row, items = take(queue, profile, row, size, slack_ms=state.slack_ms)
            return taken_row, items, reason if taken_row is row else "floor"
        finally:
            if aside is not None:
                queue.put_back(aside)


def _any_besides(queue: Queue, before_s: float) -> bool:
    """Whether the queue has items that `set_aside` would leave."""
    aside = queue.set_aside(before_s)
    found = len(queue) > 0
    queue.put_back(aside)
    return found


def take(queue: Queue, profile: Profile, row: Row, size: int, *, slack_ms: float) -> tuple[Row, list[Any]]:
    """Take up to `size` items from the queue. Return the row that will run them, and the items.

    The batch ends before the first item whose floor exceeds the row's accuracy. If this item is the head, the fastest subnet
    that reaches its floor runs instead. The batch then has the largest size whose latency is at most `slack_ms`, or `size` if
    no latency is. So a policy that ignores floors still makes progress.

    Raises ProfileError if no subnet reaches the head's floor. The server refuses such a query on arrival.
    """
    items = queue.pop(size, row.accuracy)
    if items or not len(queue):
        return row, items
    row = profile.fastest(queue.head_floors(1)[0])
    fitting = [n for n, ms in zip(profile.batch_sizes, row.latency_ms, strict=True) if n <= size and ms <= slack_ms]
    return row, queue.pop(max(fitting, default=size), row.accuracy)


def _state(turn: Turn, profile: Profile, now_s: float) -> State:
    """The state that the policy sees.

    A worker that is f times slower than its profile looks like a worker as fast as its profile, on which time runs f times
    faster. So times are divided by f, and rates are multiplied by f.
    """
    queue, (workers, slowdown, _) = turn.queue, turn.pace
    slack_ms = 1e3 * (queue.head_deadline_s - now_s)
    work = queue.head_work
    rate, variance = turn.arrivals.read(now_s, queue.pushed, queue.dispersion)
    slo_ms = turn.arrivals.slo_ms
    return State._make(  # takes half the time of the constructor
        (
            now_s,
            slack_ms / slowdown,
            queue.eligible,
            queue.head_floors(profile.batch_sizes[-1]),
            workers,
            turn.last_subnet,
            queue.late,
            rate / work * slowdown,
            variance / work**2 * slowdown,
            slo_ms / slowdown,
            queue.due_by(now_s + 1e-3 * max(2 * slack_ms, slo_ms)),
            turn.worker,
        )
    )
