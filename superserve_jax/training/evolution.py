"""Evolutionary search with an accuracy predictor under constraints, and random search as its control.

Both propose only subnets that meet the constraints, as in Once-for-All (Cai et al., ICLR 2020). `search.py` is the other
search: it has two objectives, no constraint, and evaluates every candidate.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np
from scipy.stats import qmc

from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.training import sampling, search

_POPULATION = 100  # children in a generation
_PARENTS = 25
_TRIES = 20  # number of children to make until one is new and meets the constraints
_MISSES = 3_000  # random subnets without a new one that meets the constraints, after which there are no more
_POOL = 4_096  # random subnets from which the spread ones are picked

Meets = Callable[[Subnet], bool]
"""Whether a subnet meets the constraints."""

Predict = Callable[[Sequence[Subnet]], list[float]]
"""Predicts the accuracies of subnets."""


def network(config: FamilyConfig, subnet: Subnet) -> Hashable:
    """The sizes of a subnet. Two subnets of equal sizes are one network."""
    return tuple(config.sizes(subnet).items())


def spread(
    config: FamilyConfig, count: int, *, seed: int, space: SearchSpace | None = None, tied: bool = False
) -> list[Subnet]:
    """`count` different networks to evaluate: the smallest, the largest, and random ones spread over the logarithm of FLOPs.

    A larger count only adds subnets at the end. A small space gives fewer.

    Args:
      config: the family's config.
      count: number of subnets.
      seed: seed of the random choices.
      space: the space to draw from; the family's own if left out.
      tied: whether to draw only subnets that a tied phase trains, see `SearchSpace.tied`.
    """
    within = space or config.space()
    ends = [within.smallest(), within.largest()]
    drawn = itertools.chain(ends, itertools.islice(_random(within, seed, tied), _POOL))
    networks: dict[Hashable, Subnet] = {}
    for subnet in drawn:
        networks.setdefault(network(config, subnet), subnet)
    left = list(networks.values())
    costs = np.log([config.flops(s) for s in left])
    low, high = costs[:2] if len(left) > 1 else (costs[0], costs[0])
    chosen = left[:2]
    costs[:2] = np.inf
    for place in qmc.Halton(1, scramble=False).random(min(max(count, 2), len(left)) - len(chosen))[:, 0]:
        nearest = int(np.abs(costs - (low + place * (high - low))).argmin())
        chosen.append(left[nearest])
        costs[nearest] = np.inf
    return chosen[:count]


def random_search(
    space: SearchSpace, meets: Meets, predict: Predict, *, count: int, seed: int, tied: bool = False
) -> dict[Subnet, float]:
    """Predicted accuracies of `count` random subnets that meet the constraints; fewer if there are no more.

    The arguments are those of `evolve`.
    """
    found = list(itertools.islice(_feasible(space, meets, seed, tied), count))
    return dict(zip(found, predict(found), strict=True))


def evolve(
    space: SearchSpace,
    meets: Meets,
    predict: Predict,
    *,
    count: int,
    seed: int,
    start: Iterable[Subnet] = (),
    tied: bool = False,
) -> dict[Subnet, float]:
    """Predicted accuracies of `count` subnets that meet the constraints; fewer if there are no more.

    The first generation is `start` and random subnets. Later, the 25 best subnets so far are the parents, and crossover and
    mutation make 100 children.

    Args:
      space: the space to search.
      meets: whether a subnet meets the constraints.
      predict: predicts accuracies.
      count: number of subnets whose accuracy is predicted.
      seed: seed of the random choices.
      start: subnets of the first generation, such as those that were evaluated. The others of them are left out.
      tied: whether to try only subnets that a tied phase trains, see `SearchSpace.tied`.
    """
    rng, more = np.random.default_rng([seed, 5]), _feasible(space, meets, seed, tied)
    first = dict.fromkeys(s for s in start if meets(s))
    first |= dict.fromkeys(itertools.islice((s for s in more if s not in first), _POPULATION))
    tried: dict[Subnet, float] = {}
    generation = list(first)[:count]
    while generation:
        tried |= dict(zip(generation, predict(generation), strict=True))
        parents = sorted(tried, key=lambda s: -tried[s])[:_PARENTS]
        wanted = min(_POPULATION, count - len(tried))
        new: dict[Subnet, None] = {}
        for _ in range(wanted):
            children = (_child(space, parents, rng, tied) for _ in range(_TRIES))
            allowed = (c for c in children if c not in tried and c not in new and meets(c))
            new |= dict.fromkeys(itertools.islice(allowed, 1))
        if not new:  # the children of these parents are exhausted
            new = dict.fromkeys(itertools.islice((s for s in more if s not in tried), wanted))
        generation = list(new)
    return tried


def _child(space: SearchSpace, parents: Sequence[Subnet], rng: np.random.Generator, tied: bool) -> Subnet:
    mother, father = (parents[int(rng.integers(len(parents)))] for _ in range(2))
    child = search.mutate(space, search.crossover(space, mother, father, rng), rng)
    return space.tied(child) if tied else child


def _feasible(space: SearchSpace, meets: Meets, seed: int, tied: bool) -> Iterator[Subnet]:
    """Different random subnets that meet the constraints. They end after many that do not, or that are not new."""
    seen: set[Subnet] = set()
    misses = 0
    for subnet in itertools.chain([space.smallest()], _random(space, seed + 1, tied)):
        if subnet not in seen and meets(subnet):
            misses = 0
            yield subnet
        else:
            misses += 1
        seen.add(subnet)
        if misses == _MISSES:
            return


def _random(space: SearchSpace, seed: int, tied: bool) -> Iterator[Subnet]:
    """Random subnets without end. Half of them have depths and choices that grow together, see `sampling.compound`."""
    rng = np.random.default_rng([seed, 4])
    for k in itertools.count():
        drawn = sampling.compound(space, rng) if k % 2 else space.sample(seed, k)
        yield space.tied(drawn) if tied else drawn
