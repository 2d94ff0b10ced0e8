"""Measuring a latency profile: calls of an engine as the server makes them; and what the paper expects of one. No jax."""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from superserve_jax import errors, progress
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile, Row, check_batch_sizes
from superserve_jax.subnet import Subnet

_WARM_UPS = 2
_LOAD = 0.5  # of the highest throughput seen in the warm-up

Background = Callable[[float], contextlib.AbstractContextManager[None]]
"""Runs a server under so many queries per second while open, such as `serving.server.background_traffic`."""


def measure(
    engine: Engine,
    accuracies: Mapping[Subnet, float],
    batch_sizes: Sequence[int],
    *,
    device: str,
    repeats: int = 30,
    background: Background | None = None,
) -> Profile:
    """Median and 99th percentile of the latency of every subnet at every batch size and length.

    All are measured in turn, round after round, so that a disturbance of the machine meets each of them alike.

    Args:
      engine: what to measure; it must have an executable for each, and gives the lengths.
      accuracies: accuracy (a fraction) of each subnet.
      batch_sizes: ascending.
      device: the kind of device, written into the profile.
      repeats: rounds; at least 1.
      background: what runs beside the engine during the measurement, at half the engine's highest throughput. None runs
        the engine alone.
    """
    if repeats < 1:
        raise errors.ConfigError(f"repeats must be at least 1, got {repeats}")
    batch_sizes = check_batch_sizes(batch_sizes)
    examples = _examples(engine, batch_sizes[-1])
    keys = list(itertools.product(accuracies, batch_sizes, examples))
    fastest_qps = 0.0
    for subnet, batch, length in keys:
        for _ in range(_WARM_UPS):
            start = time.perf_counter()
            engine.run(subnet, batch, examples[length][:batch])
            fastest_qps = max(fastest_qps, batch / (time.perf_counter() - start))
    times_ms: dict[tuple[Subnet, int, int], list[float]] = {key: [] for key in keys}
    gc.collect()
    with background(_LOAD * fastest_qps) if background else contextlib.nullcontext():
        for _ in progress.track(range(repeats), f"latencies of {engine.name}"):
            for subnet, batch, length in keys:
                inputs = examples[length][:batch]
                start = time.perf_counter()
                engine.run(subnet, batch, inputs)
                times_ms[subnet, batch, length].append(1e3 * (time.perf_counter() - start))
    rows_at = {
        length: tuple(
            Row(
                subnet,
                accuracy,
                tuple(float(np.median(times_ms[subnet, b, length])) for b in batch_sizes),
                tuple(float(np.percentile(times_ms[subnet, b, length], 99)) for b in batch_sizes),
            )
            for subnet, accuracy in accuracies.items()
        )
        for length in examples
    }
    return Profile(batch_sizes, rows_at.pop(0, ()), device, rows_at)


def _examples(engine: Engine, count: int) -> dict[int, list[np.ndarray]]:
    """Inputs of each length, 0 standing for that of a fixed shape. What they hold does not matter, but ids should exist."""
    rng = np.random.default_rng(0)
    ends = (0, 2) if engine.lengths else (0, 256) if np.issubdtype(engine.input_dtype, np.integer) else (0, 1)
    return {
        length: [
            rng.integers(*ends, (length, *engine.input_shape[1:]) if length else engine.input_shape).astype(engine.input_dtype)
            for _ in range(count)
        ]
        for length in engine.lengths or (0,)
    }


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


def properties(profile: Profile) -> tuple[Property, Property, Property]:
    """P1: latency rises with the batch. P2: it rises with accuracy. P3: the fastest subnet does a larger batch than the most
    accurate in the time that this takes, for every batch size but the largest.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> [(p.name, p.holding, p.of) for p in properties(paper_profile())]
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
