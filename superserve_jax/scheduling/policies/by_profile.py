"""One policy for each profile and length bucket. No jax."""

from collections.abc import Callable

from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Decision, Policy, State


class ByProfile:
    """One policy for each profile and length bucket. The argument `profile` of a call selects the policy that decides.

    The policies know nothing of each other. For example, a `Planner` plans as if all queries were in its length bucket, and as
    if all workers had its profile. A longer query counts as several.

    Args:
      make: a function that makes a policy from a profile of one length bucket, for example `functools.partial(SlackFit,
        defer=False)`.
      profiles: the profiles of the workers. For any other profile, a policy is made at its first use.
      label: the policy's name in errors. By default that of the class of its policies.
    """

    def __init__(self, make: Callable[[Profile], Policy], *profiles: Profile, label: str = ""):
        self._make, self.label = make, label
        # Keyed by id, because comparing two profiles takes longer than a decision. The kept profile keeps its id unique.
        self._policies = {id(table): (table, make(table)) for profile in profiles for table in profile.each_length}
        names = dict.fromkeys(str(getattr(policy, "name", policy)) for _, policy in self._policies.values())
        self.name = " / ".join(names)

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        found = self._policies.get(id(profile))
        return (found[1] if found else self._equal(profile))(profile, state)

    def example(self) -> Policy:
        """One of the policies. There is at least one after the first call."""
        return next(iter(self._policies.values()))[1]

    def _equal(self, profile: Profile) -> Policy:
        """The policy of an equal profile, else a new policy, for example for a worker whose batches have become smaller."""
        found = next((policy for table, policy in self._policies.values() if table == profile), None) or self._make(profile)
        self._policies[id(profile)] = profile, found
        return found
