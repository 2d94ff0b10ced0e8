"""What a swap gives to a worker, and a check of the policy before the swap. No jax."""

from typing import NamedTuple

from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.scheduling import dispatch, length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy


class Successor(NamedTuple):
    """The engine, profile and policy that a worker uses after a swap. It changes to them between two batches."""

    engine: Engine
    profile: Profile
    policy: Policy


def try_policy(successor: Successor, *, worker: int, now_s: float) -> Exception | None:
    """Tries a policy object with the profile of a new export: one query of each length. Returns the error, or None.

    The caller holds the pool's lock, as for every call of a policy.
    """
    _, profile, policy = successor
    for length in profile.lengths or (0,):
        waiting = length_queue.make_queue(profile)
        waiting.push(now_s + 1.0, None, length=length)
        try:
            dispatch.next_batch(Turn(waiting, ArrivalMeter(), policy, profile, worker=worker), now_s)
        except Exception as error:
            return error
    return None
