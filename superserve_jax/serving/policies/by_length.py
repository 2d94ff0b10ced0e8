"""One policy for each length bucket. No jax."""

from collections.abc import Callable

from superserve_jax import profile as profile_lib
from superserve_jax.serving.policies import base


class ByLength:
    """Policies that hold tables of one profile, one for each length bucket; the head's decides (see `serving.padding`).

    They know nothing of each other. A planner plans for each length bucket as though all traffic were of that one, in which a
    longer query counts for several.

    Args:
      make: a policy for the profile at one length, such as `functools.partial(SlackFit, defer=False)`.
      profile: of all lengths.
    """

    def __init__(self, make: Callable[[profile_lib.Profile], base.Policy], profile: profile_lib.Profile):
        self._policies = {table.lengths: make(table) for table in profile.tables}
        longest = self._policies[profile.tables[-1].lengths]
        self.name = getattr(longest, "name", str(longest))

    def __call__(self, profile: profile_lib.Profile, state: base.State) -> base.Decision:
        """See `base.Policy`; `profile` is the one at the head's length bucket."""
        return self._policies[profile.lengths](profile, state)
