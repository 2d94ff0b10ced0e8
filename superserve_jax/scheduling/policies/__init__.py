"""Policies: which subnet and how many queries a free worker takes. No jax.

A policy is any callable `policy(profile, state) -> Decision`. Read `base` first, then `slackfit`, the default. `create` makes
the policies of this package by name.
"""

import functools
from collections.abc import Callable

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import REASONS, Decision, Policy, State
from superserve_jax.scheduling.policies.paper import Fixed, MaxAcc, MaxBatch, PaperSlackFit
from superserve_jax.scheduling.policies.planner import Planner
from superserve_jax.scheduling.policies.slackfit import SlackFit

__all__ = [
    "NAMES",
    "REASONS",
    "ByProfile",
    "Decision",
    "Fixed",
    "MaxAcc",
    "MaxBatch",
    "PaperSlackFit",
    "Planner",
    "Policy",
    "SlackFit",
    "State",
    "create",
]

_WITH_BUCKETS: dict[str, Callable[..., Policy]] = {
    "slackfit-paper": PaperSlackFit,
    "slackfit-cumulative": functools.partial(PaperSlackFit, cumulative=True),
}
_FACTORIES: dict[str, Callable[[Profile], Policy]] = {
    "slackfit": SlackFit,
    **_WITH_BUCKETS,
    "max-acc": MaxAcc,
    "max-batch": MaxBatch,
    # The paper's INFaaS: without an accuracy threshold it always picks the least accurate model (Section 6.1).
    "least-accurate": lambda profile: Fixed(profile, profile.rows[0].subnet, name="least-accurate"),
    "fixed:smallest": lambda profile: Fixed(profile, profile.rows[0].subnet),
    "fixed:largest": lambda profile: Fixed(profile, profile.rows[-1].subnet),
    "proteus": Planner,
}
NAMES = tuple(_FACTORIES)
"""All policy names without a number. Three other names have a number after a colon. `fixed:<i>` is the i-th subnet of the
profile, from 0, in ascending order of accuracy. `slackfit-paper:<n>` and `slackfit-cumulative:<n>` have n latency buckets."""


def create(policy: str | Policy, *profiles: Profile) -> Policy:
    """Make a policy by name. A callable is returned as it is.

    Args:
      policy: a name, or a policy.
      profiles: the profiles of the workers. If they differ, or have several length buckets, the result is a `ByProfile`.

    Raises UnknownNameError for an unknown name, ConfigError for a number out of range.

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
    kind, _, number = str(policy).partition(":")
    if kind in _WITH_BUCKETS and number.isdecimal():
        return _WITH_BUCKETS[kind](profile, buckets=int(number))
    if kind != "fixed" or not number.isdecimal():
        numbered = ("fixed:<i>", "slackfit-paper:<n>", "slackfit-cumulative:<n>")
        raise errors.unknown_name("policy", policy, [*NAMES, *numbered])
    if int(number) >= len(profile.rows):
        last = len(profile.rows) - 1
        raise errors.ConfigError(f"policy '{policy}': the profile has the subnets 0 to {last}; name one of them")
    return Fixed(profile, profile.rows[int(number)].subnet)


class ByProfile:
    """One policy for each profile and length bucket. The argument `profile` of a call selects the policy that decides.

    The policies know nothing of each other. For example, a `Planner` plans as if all queries were in its length bucket, and as
    if all workers had its profile. A longer query counts as several.

    Args:
      make: a function that makes a policy from a profile of one length bucket, for example `functools.partial(SlackFit,
        defer=False)`.
      profiles: the profiles of the workers. For any other profile, a policy is made at its first use.
    """

    def __init__(self, make: Callable[[Profile], Policy], *profiles: Profile):
        self._make = make
        # Keyed by id, because comparing two profiles takes longer than a decision. The kept profile keeps its id unique.
        self._policies = {id(table): (table, make(table)) for profile in profiles for table in profile.each_length}
        names = dict.fromkeys(str(getattr(policy, "name", policy)) for _, policy in self._policies.values())
        self.name = " / ".join(names)

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        found = self._policies.get(id(profile))
        return (found[1] if found else self._equal(profile))(profile, state)

    def _equal(self, profile: Profile) -> Policy:
        """The policy of an equal profile, else a new policy, for example for a worker whose batches have become smaller."""
        found = next((policy for table, policy in self._policies.values() if table == profile), None) or self._make(profile)
        self._policies[id(profile)] = profile, found
        return found
