"""Measuring a latency profile: calls of an engine as the server makes them; and what the paper expects of one. No jax."""

import gc
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from superserve_jax import profile as profiles
from superserve_jax import progress
from superserve_jax import subnet as subnets
from superserve_jax.serving import engine as engines

_WARM_UPS = 2


def measure(
    engine: engines.Engine,
    accuracies: Mapping[subnets.Subnet, float],
    batch_sizes: Sequence[int],
    *,
    device: str,
    repeats: int = 30,
) -> profiles.Profile:
    """Median and 99th percentile of the latency of every subnet at every batch size.

    All pairs are measured in turn, round after round, so that a disturbance of the machine meets each of them alike.

    Args:
      engine: what to measure; it must have an executable for every pair.
      accuracies: accuracy (a fraction) of each subnet.
      batch_sizes: ascending.
      device: the kind of device, written into the profile.
      repeats: rounds; at least 1.
    """
    batch_sizes = profiles.check_batch_sizes(batch_sizes)
    rng = np.random.default_rng(0)
    ends = (0, 256) if np.issubdtype(engine.input_dtype, np.integer) else (0, 1)
    examples = [
        rng.integers(*ends, engine.input_shape, endpoint=False).astype(engine.input_dtype) for _ in range(batch_sizes[-1])
    ]
    pairs = [(s, b) for s in accuracies for b in batch_sizes]
    for subnet, batch in pairs:
        for _ in range(_WARM_UPS):
            engine.run(subnet, batch, examples[:batch])
    times_ms: dict[tuple[subnets.Subnet, int], list[float]] = {pair: [] for pair in pairs}
    gc.collect()
    for _ in progress.track(range(repeats), f"latencies of {engine.name}"):
        for subnet, batch in pairs:
            start = time.perf_counter()
            engine.run(subnet, batch, examples[:batch])
            times_ms[subnet, batch].append(1e3 * (time.perf_counter() - start))
    rows = tuple(
        profiles.Row(
            subnet,
            accuracy,
            tuple(float(np.median(times_ms[subnet, b])) for b in batch_sizes),
            tuple(float(np.percentile(times_ms[subnet, b], 99)) for b in batch_sizes),
        )
        for subnet, accuracy in accuracies.items()
    )
    return profiles.Profile(batch_sizes, rows, device)


class Property(NamedTuple):
    """What SlackFit builds on (the paper's Section 4.1), and how far a profile bears it out.

    Args:
      holding, of: in so many comparisons out of so many.
      worst: the lowest ratio of the latencies compared, or for P3 of the batches; what holds is above 1.
    """

    name: str
    holding: int
    of: int
    worst: float


def properties(profile: profiles.Profile) -> tuple[Property, Property, Property]:
    """P1: latency rises with the batch. P2: it rises with accuracy. P3: the fastest subnet does a larger batch than the most
    accurate in the time that this takes, for every batch size but the largest.

    >>> from superserve_jax.serving import reference
    >>> [(p.name, p.holding, p.of) for p in properties(reference.paper_profile())]
    [('P1', 24, 24), ('P2', 25, 25), ('P3', 4, 4)]
    """
    rows, sizes = profile.rows, profile.batch_sizes
    along_batch = [b / a for row in rows for a, b in itertools.pairwise(row.latency_ms)]
    along_accuracy = [
        b / a for low, high in itertools.pairwise(rows) for a, b in zip(low.latency_ms, high.latency_ms, strict=True)
    ]
    reached = []
    for size, budget_ms in list(zip(sizes, rows[-1].latency_ms, strict=True))[:-1]:
        fits = [b for b, ms in zip(sizes, rows[0].latency_ms, strict=True) if ms <= budget_ms]
        reached.append(max(fits, default=0) / size)
    return _property("P1", along_batch), _property("P2", along_accuracy), _property("P3", reached)


def _property(name: str, ratios: Iterable[float]) -> Property:
    ratios = list(ratios)
    return Property(name, sum(r > 1 for r in ratios), len(ratios), min(ratios, default=float("nan")))
