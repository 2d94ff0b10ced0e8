"""Measures the latency profile of an engine, and checks SlackFit's assumptions about profiles. No jax."""

import contextlib
import dataclasses
import gc
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from superserve_jax import errors, progress
from superserve_jax.engines.base import Engine, Launched
from superserve_jax.profile import Profile, Row, check_batch_sizes
from superserve_jax.subnet import Subnet

_WARM_UPS, _LEAST_ROUNDS = 2, 3
_BATCHES = 3  # of one measurement, if they overlap
_LOAD = 0.5  # rate of the background load / highest throughput seen in the warm-up

Background = Callable[[float], contextlib.AbstractContextManager[None]]
"""Takes a rate in queries/s, and runs a server under this load while open. See `serving.server.background_traffic`."""


def measure(
    engine: Engine,
    accuracies: Mapping[Subnet, float],
    batch_sizes: Sequence[int],
    *,
    device: str,
    repeats: int = 30,
    background: Background | None = None,
    beside: Sequence[Engine] = (),
) -> Profile:
    """Measures the median and the 99th percentile of the latency of every subnet, batch size and length bucket.

    If the engine overlaps batches, a latency is the mean time between three batches (see `batch_s`).

    Every round measures each combination once. So a disturbance of the machine affects all combinations alike.

    Args:
      engine: the engine to measure, with its length buckets.
      accuracies: the subnets to measure, and their accuracies as fractions.
      batch_sizes: the batch sizes to measure, ascending.
      device: the kind of device, written into the profile.
      repeats: the number of rounds, at least 1.
      background: the load to run during the measurement, at half of the engine's highest throughput. None runs no load.
      beside: engines that share the cores with this one. They are kept busy during the measurement.
    """
    if repeats < 1:
        raise errors.ConfigError(f"repeats must be at least 1, got {repeats}")
    batch_sizes = check_batch_sizes(batch_sizes)
    examples = _examples(engine, batch_sizes[-1])
    calls = [(s, b, inputs[:b]) for s in accuracies for b in batch_sizes for inputs in examples.values()]
    fastest_qps = max(call[1] / time_s(engine, *call) for call in calls for _ in range(_WARM_UPS))
    gc.collect()
    load = background(_LOAD * fastest_qps * (1 + len(beside))) if background else contextlib.nullcontext()
    with load, _busy(beside, calls):
        rounds = progress.track(range(repeats), f"latencies of {engine.name}")
        times_ms = 1e3 * np.array([[batch_s(engine, *call) for call in calls] for _ in rounds])
    shape = len(accuracies), len(batch_sizes), len(examples)
    # both [length buckets][subnets][batch sizes]
    medians, p99s = (ms.reshape(shape).transpose(2, 0, 1).tolist() for ms in np.percentile(times_ms, [50, 99], axis=0))
    rows_at = {
        length: tuple(
            Row(subnet, accuracy, tuple(median), tuple(p99))
            for (subnet, accuracy), median, p99 in zip(accuracies.items(), *latencies, strict=True)
        )
        for length, *latencies in zip(examples, medians, p99s, strict=True)
    }
    dtype: Any = getattr(engine, "compute_dtype", "float32")
    return Profile(batch_sizes, rows_at.pop(0, ()), device, rows_at, compute_dtype=dtype)


@contextlib.contextmanager
def _busy(engines: Sequence[Engine], calls: Sequence[tuple[Subnet, int, list[np.ndarray]]]) -> Iterator[None]:
    """Until the block ends, each engine makes random calls in a thread of its own."""
    done = threading.Event()

    def run(engine: Engine, seed: int) -> None:
        chosen = random.Random(seed)
        while not done.is_set():
            engine.run(*chosen.choice(calls))

    with errors.StartingThreads(), futures.ThreadPoolExecutor(max(1, len(engines))) as pool:
        running = [pool.submit(run, engine, i) for i, engine in enumerate(engines)]
        try:
            yield
        finally:
            done.set()
    for result in running:
        result.result()


def measure_again(
    engine: Engine,
    profile: Profile,
    *,
    seconds: float,
    most: int = 50,
    background: Background | None = None,
    beside: Sequence[Engine] = (),
) -> Profile:
    """Measures the latencies of a profile again, because a machine is not always as fast. Noise is repaired.

    Args:
      engine: the engine of the profile.
      profile: the subnets, batch sizes and length buckets to measure.
      seconds: about how long to measure. It decides the number of rounds, from 3 to `most`. See `measuring_s`.
      most: the largest number of rounds.
      background: see `measure`.
      beside: see `measure`.
    """
    repeats = max(_LEAST_ROUNDS, min(most, round(seconds / _round_s(engine, profile))))
    accuracies = {row.subnet: row.accuracy for row in profile.rows}
    options = {"device": profile.device, "repeats": repeats, "background": background, "beside": beside}
    measured = measure(engine, accuracies, profile.batch_sizes, **options).with_envelopes(profile.envelopes)
    return dataclasses.replace(profile, rows=() if measured.rows_at else measured.rows, rows_at=measured.rows_at).monotone()


def measuring_s(engine: Engine, profile: Profile, seconds: float) -> float:
    """About how many seconds `measure_again` takes: at least three rounds, and two more to warm up.

    The arguments are those of `measure_again`.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> engine = FakeEngine(paper_profile())
    >>> [round(measuring_s(engine, paper_profile(), seconds), 2) for seconds in (0.1, 9.0)]
    [1.2, 9.48]
    """
    round_s = _round_s(engine, profile)
    return max(seconds, _LEAST_ROUNDS * round_s) + _WARM_UPS * round_s


def _round_s(engine: Engine, profile: Profile) -> float:
    """The time in which `batch_s` measures each latency of a profile once."""
    batches = _BATCHES if getattr(engine, "overlap", False) else 1
    return batches * 1e-3 * sum(ms for table in profile.each_length for row in table.rows for ms in row.latency_ms)


def slower(now: Profile, before: Profile) -> float:
    """By which factor the latencies of a profile are longer than those of another one with the same subnets: the median.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> round(slower(paper_profile().scaled(1.5), paper_profile()), 3)
    1.5
    """
    latencies = ([r.latency_ms for table in p.each_length for r in table.rows] for p in (now, before))
    return float(np.median(np.divide(*map(np.array, latencies))))


def time_s(engine: Engine, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> float:
    """Seconds that an engine takes for a batch. Raises NotFiniteError with the name of the subnet."""
    start_s = time.perf_counter()
    try:
        engine.run(subnet, batch_size, inputs)
    except errors.NotFiniteError as e:
        raise errors.NotFiniteError(f"subnet {subnet.to_json()} of {engine.name}: {e}; calibrate and export it again") from e
    return time.perf_counter() - start_s


def batch_s(engine: Engine, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> float:
    """Seconds per batch, when batches follow each other without a gap.

    If the engine overlaps batches, this is the mean of the two intervals between three batches. It is the device's own time,
    unless the host is slower. The server learns the host's time while it serves. For other engines it is `time_s`.
    """
    if not getattr(engine, "overlap", False):
        return time_s(engine, subnet, batch_size, inputs)
    launch: Callable[..., Launched] = engine.launch  # type: ignore[attr-defined]
    running, ready_s = launch(subnet, batch_size, inputs), []
    for i in range(_BATCHES):
        following = launch(subnet, batch_size, inputs) if i < _BATCHES - 1 else None
        running.wait()
        ready_s.append(time.perf_counter())
        running.outputs()
        running = following or running
    return (ready_s[-1] - ready_s[0]) / (_BATCHES - 1)


def _examples(engine: Engine, count: int) -> dict[int, list[np.ndarray]]:
    """Inputs by length bucket; the key is 0 if all inputs have one shape. Values are 0 and 1, which are valid token ids."""
    rng = np.random.default_rng(0)
    shapes = {length: (length, *engine.input_shape[1:]) for length in engine.lengths} or {0: engine.input_shape}
    return {
        length: [rng.integers(0, 2, shape).astype(engine.input_dtype) for _ in range(count)]
        for length, shape in shapes.items()
    }


class Property(NamedTuple):
    """How often one of SlackFit's assumptions holds in a profile (the paper's Section 4.1).

    Args:
      name: "P1", "P2" or "P3".
      holding: the number of comparisons in which the property holds.
      of: the number of comparisons.
      worst: the lowest of the compared ratios (of latencies for P1 and P2, of batch sizes for P3). If it is above 1, the
        property holds in every comparison.
    """

    name: str
    holding: int
    of: int
    worst: float


def properties(profile: Profile) -> list[Property]:
    """Checks the three properties of a profile that SlackFit assumes.

    P1: latency rises with the batch size.
    P2: latency rises with accuracy.
    P3: while the most accurate subnet computes a batch, the fastest subnet can compute a larger one. This is compared at
    every batch size but the largest.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> [(p.name, p.holding, p.of) for p in properties(paper_profile())]
    [('P1', 24, 24), ('P2', 25, 25), ('P3', 4, 4)]
    """
    sizes, ms = np.array(profile.batch_sizes), np.array([row.latency_ms for row in profile.rows])
    reached = [max(sizes[ms[0] <= budget_ms], default=0) / size for size, budget_ms in zip(sizes[:-1], ms[-1], strict=False)]
    ratios_of = {"P1": ms[:, 1:] / ms[:, :-1], "P2": ms[1:] / ms[:-1], "P3": np.array(reached)}
    return [
        Property(name, int((ratios > 1).sum()), ratios.size, float(ratios.min()) if ratios.size else math.nan)
        for name, ratios in ratios_of.items()
    ]
