"""Which subnets a training step trains: a pure function of (seed, step).

Each program must be compiled, so random subnets come from a fixed number of subnet buckets. A subnet bucket has an envelope,
which is a random subnet. At every position, a member has the envelope's choice or the next smaller one. So the bucket's
program costs little more than the member itself.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.programs import Program
from superserve_jax.training.config import Phase, TrainConfig

_CANDIDATES = 256  # random subnets from which the envelopes are picked


@dataclasses.dataclass(frozen=True)
class Choice:
    """One subnet of a step and the program that runs it."""

    program: Program
    subnet: Subnet


class Sampler:
    """The subnets of every step of one phase.

    Args:
      config: the family's config.
      buckets: number of subnet buckets for the random subnets.
      random_subnets: number of random subnets per step.
      seed: seed of envelopes and members.
      space: the search space of the phase; the family's own if left out.
      tied: train tied subnets only, see `SearchSpace.tied`.
    """

    def __init__(
        self,
        config: FamilyConfig,
        *,
        buckets: int,
        random_subnets: int,
        seed: int,
        space: SearchSpace | None = None,
        tied: bool = False,
    ):
        whole = config.space()
        self.space = space or whole
        self.random_subnets = random_subnets
        self.seed = seed
        self._validate, self._tied = whole.validate, tied
        self.largest, self.smallest = (
            Choice(programs.sliced(config, s), s) for s in (whole.largest(), whole.validate(self.space.smallest()))
        )
        found = envelopes(config, buckets, seed=seed, space=self.space, tied=tied) if random_subnets else []
        self.buckets = tuple(programs.bucketed(config, [self._lowest(e), e]) for e in found)

    def step(self, step: int) -> tuple[Choice, ...]:
        """The largest, the smallest and the random subnets of a step; only the largest if nothing is elastic."""
        if self.smallest == self.largest:
            return (self.largest,)
        rng = np.random.default_rng([self.seed, step])
        choices = [self.largest, self.smallest]
        for _ in range(self.random_subnets):
            program = self.buckets[rng.integers(len(self.buckets))]
            found = member(self.space, program.envelope, rng)
            choices.append(Choice(program, self._validate(self.space.tied(found) if self._tied else found)))
        return tuple(choices)

    def _lowest(self, envelope: Subnet) -> Subnet:
        lowest = lowest_member(self.space, envelope)
        # A depth that is one smaller can tie a block to a choice that is several smaller.
        return dataclasses.replace(lowest, axes=self.space.smallest().axes) if self._tied else lowest


class Part(NamedTuple):
    """A phase of a run: its first step, its settings and the sampler of its subnets."""

    first: int
    phase: Phase
    sampler: Sampler


def plan(config: TrainConfig, num_steps: int) -> list[Part]:
    """The phases of a run of `num_steps` steps, in order. A phase without a step is left out."""
    phases = config.phases or (Phase(),)
    total = sum(p.share for p in phases)
    ends = [round(num_steps * share / total) for share in itertools.accumulate(p.share for p in phases)]
    parts = []
    for phase, first, end in zip(phases, [0, *ends], ends, strict=False):
        if first < end:
            sampler = Sampler(
                config.model,
                buckets=config.buckets,
                random_subnets=config.random_subnets,
                seed=config.seed,
                space=phase.space(config.model),
                tied=phase.tied,
            )
            parts.append(Part(first, phase, sampler))
    return parts


def at(parts: list[Part], step: int) -> Part:
    """The part that contains a step."""
    return next(part for part in reversed(parts) if part.first <= step)


def envelopes(
    config: FamilyConfig, count: int, *, seed: int, space: SearchSpace | None = None, tied: bool = False
) -> list[Subnet]:
    """`count` different random subnets, evenly spaced in the logarithm of FLOPs between smallest and largest.

    Depth and width grow together, as in the good subnets that CompOFA found: see `compound`. `space` and `tied` are as in
    `Sampler`.
    """
    within = space or config.space()
    low, high = (math.log(config.flops(s)) for s in (within.smallest(), within.largest()))
    rng = np.random.default_rng([seed, 2])
    drawn = [compound(within, rng) for _ in range(_CANDIDATES)]
    pool = dict.fromkeys(map(within.tied, drawn) if tied else drawn)
    cost = {s: math.log(config.flops(s)) for s in pool}
    chosen: list[Subnet] = []
    for i in range(min(count, len(cost))):
        target = low + (high - low) * (i + 1) / (count + 1)
        best = min(cost, key=lambda s, target=target: abs(cost[s] - target))
        chosen.append(best)
        del cost[best]
    return chosen


def compound(space: SearchSpace, rng: np.random.Generator) -> Subnet:
    """A random subnet. Its depths and choices are within half a step of one random level between smallest and largest."""
    level = rng.random()

    def draw(choices: Sequence[Any], _: Any) -> Any:
        place = level * (len(choices) - 1) + rng.uniform(-0.5, 0.5)
        return choices[min(max(round(place), 0), len(choices) - 1)]

    return space.vary(space.largest(), draw)


def member(space: SearchSpace, envelope: Subnet, rng: np.random.Generator) -> Subnet:
    """A random member of a subnet bucket: at every position the envelope's choice or, equally often, the next smaller one."""
    found = space.vary(envelope, lambda choices, top: top if rng.integers(2) else _below(choices, top))
    return found if envelope.covers(found) else envelope  # with rule "every_other", a smaller depth can keep other blocks


def lowest_member(space: SearchSpace, envelope: Subnet) -> Subnet:
    """The member with the next smaller choice at every position. Not in canonical form: it only shows which sizes vary."""
    gates = [0] * space.num_blocks
    if space.rule == "first":
        kept = [sum(envelope.gates[b] for b in stage) for stage in space.stages]
        depths = [_below(d, k) for d, k in zip(space.depths, kept, strict=True)]
        gates = list(space.gates(depths))
    axes = tuple(
        (a.name, tuple(_below(c, top) for c, top in zip(a.choices, envelope[a.name], strict=True))) for a in space.axes
    )
    return Subnet(tuple(min(g, e) for g, e in zip(gates, envelope.gates, strict=True)), axes)


def _below(choices: Sequence[Any], top: float) -> Any:
    return choices[max(choices.index(top) - 1, 0)]
