"""Policies: which subnet and how many queries a free worker takes. No jax.

A policy is any callable `policy(profile, state) -> Decision`. Read `base` first, then `slackfit`, the default. `create` makes
policies by name. docs/policies.md shows how to write one.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import TypeGuard

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import custom
from superserve_jax.scheduling.policies.base import REASONS, Decision, Policy, State
from superserve_jax.scheduling.policies.by_profile import ByProfile
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
    "check_name",
    "create",
    "expand",
    "is_custom",
    "labels",
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
profile, from 0, in ascending order of accuracy. `slackfit-paper:<n>` and `slackfit-cumulative:<n>` have n latency buckets.
Your own policies have names such as `my_file.py:my_policy` (see `custom`)."""
_KINDS = tuple({name.partition(":")[0] for name in NAMES})


def is_custom(policy: object) -> TypeGuard[str]:
    """Whether this is the name of a policy outside of this package, such as "my_file.py:my_policy"."""
    return isinstance(policy, str) and policy.partition(":")[0] not in _KINDS and custom.has_form(policy)


def expand(policies: Sequence[str], *, subnets: int) -> tuple[str, ...]:
    """The names with "fixed:all" replaced by one name for each subnet.

    >>> expand(["slackfit", "fixed:all"], subnets=2)
    ('slackfit', 'fixed:0', 'fixed:1')
    """
    fixed = tuple(f"fixed:{i}" for i in range(subnets))
    return tuple(one for name in policies for one in (fixed if name == "fixed:all" else (name,)))


def labels(policies: Sequence[str]) -> dict[str, str]:
    """Names for tables and plots: the part after the colon of your own policies.

    A policy keeps its whole name if another one would be called the same, or if a built-in policy is.

    >>> labels(["fixed:largest", "a.py:mine", "a.py:other", "b.py:other"])
    {'fixed:largest': 'fixed:largest', 'a.py:mine': 'mine', 'a.py:other': 'a.py:other', 'b.py:other': 'b.py:other'}
    >>> labels(["a.py:slackfit"])
    {'a.py:slackfit': 'a.py:slackfit'}
    """
    short = {name: name.rpartition(":")[2] if is_custom(name) else name for name in policies}
    count = collections.Counter(short.values())
    return {name: label if count[label] == 1 and label not in _KINDS else name for name, label in short.items()}


def check_name(policy: str) -> None:
    """Checks the name of a policy without a profile. `create` finds other errors, such as a number that is too large.

    Raises UnknownNameError for an unknown name, or ConfigError for a file that does not exist.

    >>> check_name("slackfi")
    Traceback (most recent call last):
    superserve_jax.errors.UnknownNameError: unknown policy 'slackfi': did you mean 'slackfit'? ...
    """
    if is_custom(policy):
        return custom.check_file(policy)
    kind, _, number = str(policy).partition(":")
    if policy not in _FACTORIES and not ((kind in _WITH_BUCKETS or kind == "fixed") and number.isdecimal()):
        others = ("fixed:<i>", "slackfit-paper:<n>", "slackfit-cumulative:<n>", "my_file.py:my_policy")
        raise errors.unknown_name("policy", policy, [*NAMES, *others])


def create(policy: str | Policy, *profiles: Profile) -> Policy:
    """Make a policy by name. A callable is returned as it is.

    Args:
      policy: a name of this package, a name such as "my_file.py:my_policy" (see `custom`), or a policy.
      profiles: the profiles of the workers. If they differ, or have several length buckets, the result is a `ByProfile`.

    Raises UnknownNameError for an unknown name. ConfigError: a number is out of range, or a policy of yours cannot be made.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> create("fixed:5", profile)(profile, State(now_s=0.0, slack_ms=36.0, waiting=9)).batch
    16
    """
    if callable(policy):
        return policy
    if is_custom(policy):
        return custom.load(policy, *profiles)
    profile = profiles[0]
    if len(profile.lengths) > 1 or any(other is not profile for other in profiles):
        return ByProfile(functools.partial(create, policy), *profiles)
    if policy in _FACTORIES:
        return _FACTORIES[policy](profile)
    check_name(policy)
    kind, _, number = policy.partition(":")
    if kind in _WITH_BUCKETS:
        return _WITH_BUCKETS[kind](profile, buckets=int(number))
    if int(number) >= len(profile.rows):
        last = len(profile.rows) - 1
        raise errors.ConfigError(f"policy '{policy}': the profile has the subnets 0 to {last}; name one of them")
    return Fixed(profile, profile.rows[int(number)].subnet)
