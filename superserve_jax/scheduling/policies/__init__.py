"""Policies: which subnet and how many queries a free worker takes. No jax.

A policy is any callable `policy(profile, state) -> Decision`; `create` makes those of this package by name.
"""

import functools
from collections.abc import Callable

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import REASONS, Decision, Policy, State
from superserve_jax.scheduling.policies.baselines import Fixed, LeastAccurate, MaxAcc, MaxBatch
from superserve_jax.scheduling.policies.by_profile import ByProfile
from superserve_jax.scheduling.policies.planner import Planner
from superserve_jax.scheduling.policies.slackfit import Reading, SlackFit

__all__ = [
    "NAMES",
    "REASONS",
    "ByProfile",
    "Decision",
    "Fixed",
    "LeastAccurate",
    "MaxAcc",
    "MaxBatch",
    "Planner",
    "Policy",
    "SlackFit",
    "State",
    "create",
]

_READINGS: dict[str, Reading] = {"slackfit-paper": "in_range", "slackfit-cumulative": "cumulative"}
_FACTORIES: dict[str, Callable[[Profile], Policy]] = {
    "slackfit": SlackFit,
    **{name: functools.partial(SlackFit, guard=False, reading=reading) for name, reading in _READINGS.items()},
    "max-acc": MaxAcc,
    "max-batch": MaxBatch,
    "least-accurate": LeastAccurate,
    "fixed:smallest": lambda profile: Fixed(profile, profile.rows[0].subnet),
    "fixed:largest": lambda profile: Fixed(profile, profile.rows[-1].subnet),
    "proteus": Planner,
}
NAMES = tuple(_FACTORIES)
"""The names that `create` knows, besides `fixed:<i>` for the i-th subnet of the profile, in ascending order of accuracy;
and `slackfit-paper:<n>` and `slackfit-cumulative:<n>` with n latency buckets."""


def create(policy: str | Policy, *profiles: Profile) -> Policy:
    """The policy of a name, built for a profile; for each, where the workers have several or they have several length buckets
    (`ByProfile`). A callable is returned as it is.

    Raises UnknownNameError for a name that is not known, ConfigError for a subnet that the profile does not have.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> create("fixed:5", profile)(profile, State(now_s=0.0, slack_ms=36.0, waiting=9)).batch
    16
    """
    if callable(policy):
        return policy
    profile = profiles[0]
    if len(profile.lengths) > 1 or any(other is not profile for other in profiles):
        return ByProfile(functools.partial(create, policy), *profiles)
    if policy in _FACTORIES:
        return _FACTORIES[policy](profile)
    kind, _, index = str(policy).partition(":")
    if kind in _READINGS and index:
        if not index.isdecimal():
            raise errors.ConfigError(
                f"policy '{policy}': after the colon stands the number of latency buckets, such as {kind}:8"
            )
        return SlackFit(profile, guard=False, buckets=int(index), reading=_READINGS[kind])
    if kind != "fixed" or not index.isdecimal():
        raise errors.unknown_name("policy", policy, [*NAMES, "fixed:<i>"])
    if int(index) >= len(profile.rows):
        raise errors.ConfigError(
            f"policy '{policy}': the profile has the subnets 0 to {len(profile.rows) - 1}; name one of them"
        )
    return Fixed(profile, profile.rows[int(index)].subnet)
