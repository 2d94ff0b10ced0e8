"""The paper's policies: SlackFit as the paper describes it, and the baselines of its Section 6.1. No jax.

These policies look only at the slack of the head, not at the number of waiting queries. The paper does not say what the
baselines do if no choice saves the head. Here the fastest subnet of the policy runs its largest batch, because a smaller batch
would only lose more queries. These policies ignore floors, and `dispatch.take` enforces floors.
"""

import bisect
import itertools
import math
from collections.abc import Iterable

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Decision, State, Table
from superserve_jax.subnet import Subnet


class _BySlack:
    """Takes, of some choices, the one with the largest latency that is at most the slack.

    Args:
      table: the latencies of all choices.
      choices: the choices, as pairs of the index of a batch size and the rank of a subnet.
    """

    def __init__(self, table: Table, choices: Iterable[tuple[int, int]]):
        kept = sorted({(table.rows[rank][size], size, rank) for size, rank in choices})
        lost = Decision(table.subnets[0], table.sizes[-1], reason="lost")
        self._latency_ms = [-math.inf, *(ms for ms, _, _ in kept)]
        self._decisions = [lost, *(Decision(table.subnets[rank], table.sizes[size], reason="slack") for _, size, rank in kept)]

    def __call__(self, profile: Profile, state: State) -> Decision:
        """See `base.Policy`."""
        return self._decisions[bisect.bisect_right(self._latency_ms, state.slack_ms) - 1]


class PaperSlackFit(_BySlack):
    """SlackFit as in the paper (Section 4.2, Appendix A.5). It looks up the head's slack in evenly spaced latency buckets.

    A choice is a subnet and a batch size. Latency bucket i of n covers the latencies

        low + i / n * (high - low)  <  latency  <=  low + (i + 1) / n * (high - low)

    from the fastest choice (low) to the slowest (high). Each latency bucket keeps one choice: the choice with the largest
    batch, and among equal batches the most accurate subnet. The policy takes the kept choice with the largest
    `latency <= slack`.

    If every kept choice is slower than the slack, the least accurate subnet runs the largest batch, even if a small batch
    could save the head. The paper leaves this case open. A large batch clears a backlog faster, which is worth 3 points of
    attainment in the hardest traffic.

    The number of latency buckets decides whether a backlog ever drains. More slack may select a larger subnet with a smaller
    batch, and then throughput falls. On the recalled profile, 6 to 10 latency buckets rank the policies as the paper does. The
    default, 8, is in the middle. With 8, the rule never trades batch size for accuracy on that profile: more slack gives no
    smaller batch (docs/reproduction.md).

    Args:
      profile: the profile of the workers.
      buckets: number of latency buckets, from 1 to 100,000.
      cumulative: another reading of the paper's rule: a latency bucket also covers all choices that are faster than its range.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> decision = PaperSlackFit(profile)(profile, State(now_s=0.0, slack_ms=20.0, waiting=50))
    >>> profile.row(decision.subnet).accuracy, decision.batch
    (0.7825, 16)
    """

    def __init__(self, profile: Profile, *, buckets: int = 8, cumulative: bool = False):
        if not (isinstance(buckets, int) and 1 <= buckets <= 100_000):
            raise errors.ConfigError(f"buckets must be a whole number from 1 to 100,000, got {buckets!r}; 8 is the default")
        self.name = "slackfit-cumulative" if cumulative else "slackfit-paper"
        table = Table(profile)
        low, high = table.rows[0][0], table.rows[-1][-1]
        best: list[tuple[int, int] | None] = [None] * buckets  # (size, rank) of the kept choice
        for size, rank in itertools.product(range(len(table.sizes)), range(len(table.rows))):  # a later choice is better
            share = (table.rows[rank][size] - low) / (high - low) if high > low else 1.0
            first = max(math.ceil(share * buckets) - 1, 0)
            for i in range(first, buckets if cumulative else first + 1):
                best[i] = (size, rank)
        super().__init__(table, filter(None, best))


class Fixed(_BySlack):
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
        super().__init__(Table(profile.only([subnet])), ((size, 0) for size in range(len(profile.batch_sizes))))


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
