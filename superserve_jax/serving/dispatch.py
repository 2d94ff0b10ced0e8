"""What happens when a worker is free: the policy is asked, and the batch is taken. Server and simulator share it. No jax."""

from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.serving import policies, queue
from superserve_jax.subnet import Subnet


def next_batch(
    waiting: queue.DeadlineQueue,
    meter: queue.Meter,
    policy: policies.Policy,
    profile: Profile,
    now_s: float,
    *,
    workers: int,
    last_subnet: Subnet | None,
    worker: int,
) -> tuple[Row, list[Any], float]:
    """The row to run, its batch, taken from the queue, and the milliseconds of loading that the policy wants before.

    Args:
      waiting: the queue, not empty.
      meter: of its arrivals.
      policy: for `profile`.
      now_s: the time.
      workers: how many are alive.
      last_subnet, worker: what the asking worker ran last, and its number.

    Raises:
      ConfigError, ProfileError: the decision is of no query, or of a subnet that the profile does not have. Then, as with
        whatever the policy raises, nothing has been taken.
    """
    slack_ms = 1e3 * (waiting.head_deadline_s - now_s)
    floors = waiting.head_floors(profile.max_batch)
    traffic = meter.read(now_s, waiting.pushed)
    near = waiting.due_by(now_s + 1e-3 * max(2 * slack_ms, meter.slo_ms))
    state = policies.State(
        now_s, slack_ms, len(waiting), floors, workers, last_subnet, waiting.late, *traffic, meter.slo_ms, near, worker
    )
    try:
        subnet, size, defer_ms, loading_ms = policy(profile, state)
        row = profile.row(subnet)
        if size < 1:
            raise errors.ConfigError(f"a decision needs a batch of at least 1, got {size}")
    except Exception as error:
        error.add_note(f"the policy was asked in {state!r}")
        raise
    row, items = queue.take(
        waiting, profile, row, min(size, profile.max_batch), slack_ms=slack_ms, defer_before_s=now_s + 1e-3 * defer_ms
    )
    return row, items, loading_ms
