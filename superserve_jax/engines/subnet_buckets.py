"""Which subnets share an executable, when more are served than there should be executables. No jax.

The subnets of a **subnet bucket** run in one program of the size of their envelope, masked down to each. A block that a subnet
drops is skipped at run time; channels that it does not have are computed all the same. So sharing costs latency, as little as
the choice of buckets can make it, with FLOPs standing for latency.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet, envelope_of

Flops = Callable[[Subnet], float]

_ROUNDS = 10  # of moving subnets to better buckets; it ends before
_NEAR = 6  # buckets that are tried for each subnet


def choose(subnet_list: Sequence[Subnet], flops: Flops, count: int) -> dict[Subnet, Subnet]:
    """The subnet bucket, an envelope, of every subnet: at most `count` different ones.

    It makes the mean of FLOPs computed over FLOPs needed small. Beginning with a bucket for each subnet, the two whose
    union costs least are joined, as often as need be; then subnets move from bucket to bucket as long as that helps. The first
    part reckons with envelopes whole, the second with the blocks that are skipped. 500 subnets take half a minute.

    Args:
      subnet_list: what is served; all different.
      flops: of a subnet, or of an envelope.
      count: of subnet buckets, at least 1.

    >>> small, middle, large = (Subnet((1,), (("width", (w,)),)) for w in (1.0, 1.1, 4.0))
    >>> found = choose([small, middle, large], lambda s: s["width"][0] ** 2, 2)
    >>> found[small] == found[middle] == middle, found[large] == large
    (True, True)
    """
    if count < 1:
        raise errors.ConfigError(f"the number of subnet buckets must be at least 1, got {count}")
    if len(subnet_list) <= count:
        return {s: s for s in subnet_list}
    if count == 1:
        return dict.fromkeys(subnet_list, envelope_of(subnet_list))
    return _moved(_joined(subnet_list, flops, count), flops, count)


def extra(bucket_of: Mapping[Subnet, Subnet], flops: Flops) -> float:
    """The mean over the subnets of FLOPs computed over FLOPs needed, less 1: 0 where every subnet has its own executable."""
    return sum(flops(s.computed_in(top)) / flops(s) for s, top in bucket_of.items()) / len(bucket_of) - 1


def _joined(subnet_list: Sequence[Subnet], flops: Flops, count: int) -> list[list[Subnet]]:
    """Greedy: joins the two buckets whose union adds least, until `count` are left."""
    members = [[s] for s in subnet_list]
    tops = list(subnet_list)
    need = np.array([1 / flops(s) for s in subnet_list])  # sum over a bucket's members
    cost = np.ones(len(tops))  # of each bucket: its envelope's FLOPs times `need`
    adds = np.full((len(tops), len(tops)), np.inf)  # what the union of two buckets costs more than they do; upper triangle

    def union_adds(i: int, j: int) -> float:
        return flops(envelope_of((tops[i], tops[j]))) * (need[i] + need[j]) - cost[i] - cost[j]

    for i in range(len(tops)):
        for j in range(i + 1, len(tops)):
            adds[i, j] = union_adds(i, j)
    for _ in range(len(tops) - count):
        i, j = map(int, np.unravel_index(np.argmin(adds), adds.shape))
        cost[i] += cost[j] + adds[i, j]
        need[i] += need[j]
        tops[i] = envelope_of((tops[i], tops[j]))
        members[i] += members[j]
        members[j] = []
        adds[j, :] = adds[:, j] = np.inf
        for k, those in enumerate(members):
            if those and k != i:
                adds[min(i, k), max(i, k)] = union_adds(i, k)
    return [those for those in members if those]


def _moved(buckets: Sequence[Sequence[Subnet]], flops: Flops, count: int) -> dict[Subnet, Subnet]:
    """Local search: subnets move to the bucket, out of those where they would cost least themselves, whose cost rises by less
    than that of theirs falls."""
    known: dict[Subnet, float] = {}

    def computed(subnet: Subnet, envelope: Subnet) -> float:
        """FLOPs of a subnet in its bucket."""
        key = subnet.computed_in(envelope)
        if key not in known:
            known[key] = flops(key)
        return known[key]

    def cost(those: Sequence[Subnet]) -> float:
        top = envelope_of(those) if those else None
        return sum(computed(s, top) / needed[s] for s in those if top)

    needed = {s: flops(s) for those in buckets for s in those}
    members = [list(those) for those in buckets] + [[] for _ in range(count - len(buckets))]
    costs = [cost(those) for those in members]
    place = {s: i for i, those in enumerate(members) for s in those}
    for _ in range(_ROUNDS):
        before = dict(place)
        for s, here in before.items():
            rest = [m for m in members[here] if m is not s]
            saved = costs[here] - cost(rest)
            tops = {i: envelope_of([*those, s]) for i, those in enumerate(members) if i != here}
            near = sorted(tops, key=lambda i: computed(s, tops[i]))[:_NEAR]
            there, rise = min(((i, cost([*members[i], s]) - costs[i]) for i in near), key=lambda found: found[1])
            if rise < saved - 1e-9:
                members[here], members[there] = rest, [*members[there], s]
                costs[here] -= saved
                costs[there] += rise
                place[s] = there
        if place == before:
            break
    return {s: envelope_of(those) for those in members for s in those}
