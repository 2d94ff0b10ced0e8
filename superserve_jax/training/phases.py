"""Phases: which steps of a run belong to which phase, and what is elastic in each."""

import itertools
from typing import NamedTuple

from superserve_jax.training.config import Phase, TrainConfig
from superserve_jax.training.sampling import Sampler


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
