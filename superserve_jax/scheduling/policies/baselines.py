"""The policies that the paper compares SlackFit with (its Section 6.1). No jax.

As in the paper, they look only at the slack of the head, not at the number of waiting queries. The paper does not say what to
do if no choice saves the head. Here the fastest subnet of the policy runs its largest batch, because a smaller batch would
only lose more queries. These policies ignore floors, and `dispatch.take` enforces floors.
"""

import bisect

from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Decision, State, Table
from superserve_jax.subnet import Subnet


class Fixed:
    """One subnet for all traffic, with the largest batch that it runs within the slack. The paper's Clipper+.

    It represents Clipper, Clockwork and TF-Serving, which adapt only the batch to the slack. The policy can collapse if
    throughput grows with the batch: a backlog leaves little slack, little slack means small batches, and the backlog never
    drains.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> policy = Fixed(profile, profile.rows[0].subnet)
    >>> policy(profile, State(now_s=0.0, slack_ms=6.0, waiting=20)).batch
    8
    """

    def __init__(self, profile: Profile, subnet: Subnet, *, name: str = ""):
        self.name = name or f"fixed:{profile.rows.index(profile.row(subnet))}"
        self._latency_ms = profile.only([subnet]).monotone().rows[0].latency_ms
        # One decision for each batch size. The last one, index -1, is for a lost head: the largest batch again.
        sizes = (*profile.batch_sizes, profile.max_batch)
        reasons = (*("slack" for _ in profile.batch_sizes), "lost")
        self._decisions = tuple(Decision(subnet, b, reason=why) for b, why in zip(sizes, reasons, strict=True))

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        return self._decisions[bisect.bisect_right(self._latency_ms, state.slack_ms) - 1]


class MaxAcc:
    """The paper's MaxAcc: the most accurate subnet that runs one query within the slack, with the largest batch that it can.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> decision = MaxAcc(profile)(profile, State(now_s=0.0, slack_ms=8.0, waiting=20))
    >>> profile.row(decision.subnet).accuracy, decision.batch
    (0.8016, 2)
    """

    name = "max-acc"

    def __init__(self, profile: Profile):
        self._table = Table(profile)

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        table = self._table
        rank = table.most_accurate(0, state.slack_ms)
        if rank < 0:
            return Decision(table.subnets[0], table.sizes[-1], reason="lost")
        return Decision(table.subnets[rank], table.sizes[table.largest_batch(rank, state.slack_ms)], reason="slack")


class MaxBatch:
    """The paper's MaxBatch: the largest batch that any subnet runs within the slack, on the most accurate subnet that does so.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> decision = MaxBatch(profile)(profile, State(now_s=0.0, slack_ms=7.0, waiting=20))
    >>> profile.row(decision.subnet).accuracy, decision.batch
    (0.7669, 8)
    """

    name = "max-batch"

    def __init__(self, profile: Profile):
        self._table = Table(profile)

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        table = self._table
        size = table.largest_batch(0, state.slack_ms)
        if size < 0:
            return Decision(table.subnets[0], table.sizes[-1], reason="lost")
        return Decision(table.subnets[table.most_accurate(size, state.slack_ms)], table.sizes[size], reason="slack")
