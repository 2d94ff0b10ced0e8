"""One policy for each profile: of a kind of device, of a length bucket. No jax."""

from collections.abc import Callable

from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Decision, Policy, State


class ByProfile:
    """Policies that hold tables of one profile, one for each profile and, of a profile with length buckets, for each of these.

    Which of them decides, says the profile that is passed: that of the asking worker, at the head's length (see
    `scheduling.length_queue`). They know nothing of each other. A planner plans for each as though all traffic were of that
    length bucket, in which a longer query counts for several, and all workers were like the one that asks.

    Args:
      make: a policy for a profile at one length, such as `functools.partial(SlackFit, defer=False)`.
      profiles: of the workers, each of all lengths; for others a policy is made when they are first seen.
    """

    def __init__(self, make: Callable[[Profile], Policy], *profiles: Profile):
        self._make = make
        # Found by identity, since to compare two profiles takes longer than a decision; they are kept, so that none is reused.
        self._policies = {id(table): (table, make(table)) for profile in profiles for table in profile.each_length}
        names = dict.fromkeys(str(getattr(policy, "name", policy)) for _, policy in self._policies.values())
        self.name = " / ".join(names)

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        found = self._policies.get(id(profile))
        return (found[1] if found else self._equal(profile))(profile, state)

    def _equal(self, profile: Profile) -> Policy:
        """The policy of a profile that is another object; a new one for that of a worker whose batches have to be smaller."""
        found = next((policy for table, policy in self._policies.values() if table == profile), None) or self._make(profile)
        self._policies[id(profile)] = profile, found
        return found
