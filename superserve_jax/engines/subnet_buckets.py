"""Groups subnets into subnet buckets, which share an executable, to limit the number of executables. No jax.

The subnets of a **subnet bucket** share one program. The program has the size of their envelope, and is masked down to each
subnet. Blocks that a subnet drops are skipped at run time. Channels that a subnet lacks are still computed, so sharing costs
latency. `choose` keeps this cost low, and estimates it by FLOPs.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.subnet import Subnet, envelope_of

Flops = Callable[[Subnet], float]

_MAX_ROUNDS = 10  # the most rounds of the local search, which usually ends earlier
_TRIED = 6  # the number of subnet buckets that the local search tries for each subnet


def choose(subnet_list: Sequence[Subnet], flops: Flops, count: int) -> dict[Subnet, Subnet]:
    """Assigns subnets to at most `count` subnet buckets. Returns the envelope of each subnet's bucket.

    It searches for a small mean of (FLOPs computed / FLOPs needed), in two parts:

    1. Every subnet starts in its own subnet bucket. The two whose union adds the least cost are joined, until `count` are
       left. Here every subnet computes the FLOPs of its whole envelope.
    2. Subnets move to other subnet buckets as long as this lowers the mean. Here skipped blocks cost nothing.

    It takes half a minute for 500 subnets.

    Args:
      subnet_list: the served subnets, all different.
      flops: a function that returns the FLOPs of a subnet or of an envelope.
      count: the number of subnet buckets, at least 1.

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
    """The mean of (FLOPs computed / FLOPs needed) over all subnets, minus 1. It is 0 if no subnet shares an executable."""
    return sum(flops(s.computed_in(top)) / flops(s) for s, top in bucket_of.items()) / len(bucket_of) - 1


def _joined(subnet_list: Sequence[Subnet], flops: Flops, count: int) -> list[list[Subnet]]:
    """Part 1 of `choose`: joins the two subnet buckets whose union adds the least cost, until `count` are left."""
    members = [[s] for s in subnet_list]
    tops = list(subnet_list)
    need = np.array([1 / flops(s) for s in subnet_list])  # for each subnet bucket, the sum over its members
    cost = np.ones(len(tops))  # for each subnet bucket: FLOPs of its envelope times `need`
    added = np.full((len(tops), len(tops)), np.inf)  # [i, j], i < j: cost of the union of i and j, minus both costs

    def union_adds(i: int, j: int) -> float:
        return flops(envelope_of((tops[i], tops[j]))) * (need[i] + need[j]) - cost[i] - cost[j]

    for i, j in itertools.combinations(range(len(tops)), 2):
        added[i, j] = union_adds(i, j)
    for _ in range(len(tops) - count):
        i, j = map(int, np.unravel_index(np.argmin(added), added.shape))
        cost[i] += cost[j] + added[i, j]
        need[i] += need[j]
        tops[i] = envelope_of((tops[i], tops[j]))
        members[i] += members[j]
        members[j] = []
        added[j, :] = added[:, j] = np.inf
        for k, group in enumerate(members):
            if group and k != i:
                added[min(i, k), max(i, k)] = union_adds(i, k)
    return [group for group in members if group]


def _moved(groups: Sequence[Sequence[Subnet]], flops: Flops, count: int) -> dict[Subnet, Subnet]:
    """Part 2 of `choose`, a local search: moves a subnet if the cost saved in its subnet bucket exceeds the cost added in
    another. For each subnet, it tries only the `_TRIED` subnet buckets in which the subnet itself costs least."""
    flops = functools.cache(flops)

    def computed(subnet: Subnet, envelope: Subnet) -> float:
        return flops(subnet.computed_in(envelope))

    def cost(group: Sequence[Subnet]) -> float:
        top = envelope_of(group) if group else None
        return sum(computed(s, top) / flops(s) for s in group if top)

    members = [list(group) for group in groups] + [[] for _ in range(count - len(groups))]
    costs = [cost(group) for group in members]
    place = {s: i for i, group in enumerate(members) for s in group}
    for _ in range(_MAX_ROUNDS):
        before = dict(place)
        for s, here in before.items():
            rest = [m for m in members[here] if m is not s]
            saved = costs[here] - cost(rest)
            tops = {i: envelope_of([*group, s]) for i, group in enumerate(members) if i != here}
            tried = sorted(tops, key=lambda i: computed(s, tops[i]))[:_TRIED]
            there, rise = min(((i, cost([*members[i], s]) - costs[i]) for i in tried), key=lambda found: found[1])
            if rise < saved - 1e-9:
                members[here], members[there] = rest, [*members[there], s]
                costs[here] -= saved
                costs[there] += rise
                place[s] = there
        if place == before:
            break
    return {s: envelope_of(group) for group in members for s in group}
