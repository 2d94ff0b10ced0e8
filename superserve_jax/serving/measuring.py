"""Measuring a latency profile: calls of an engine as the server makes them. No jax."""

import gc
import time
from collections.abc import Mapping, Sequence

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
