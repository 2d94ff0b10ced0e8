"""Traffic that can last for hours, and measurements that show whether memory or latency grow meanwhile. No jax.

Of each query, only the latency and the outcome are kept, and only until the end of the second in which it resolved. So the
measurement itself does not make memory grow.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
from scipy import stats

from superserve_jax import errors
from superserve_jax.engines.base import Engine, Wrapper
from superserve_jax.loadtest import loadgen
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

SLO_FACTORS = (1, 2, 4)
SWING, PERIOD_S = 0.5, 10
"""In each period of PERIOD_S seconds, the rate rises and falls by the share SWING."""

FLOORED = 0.03
"""The share of queries with a floor. A floor is the accuracy of a random subnet, so every subnet answers, even in bursts."""


@dataclasses.dataclass(frozen=True)
class Second:
    """One second of traffic.

    Args:
      time_s: the end of this second, counted from the start of the traffic.
      answers: the number of answered queries.
      met: the number of queries that were answered by their deadline.
      p50_ms: median latency of the answered queries; NaN without any.
      p99_ms: 99th percentile of the latency of the answered queries; NaN without any.
      batches: the number of batches of all engines.
      changes: the number of batches with another subnet than the previous batch of the same engine.
      lag_ms: the greatest lateness of the load generator.
      memory_mb: resident memory at the end of this second.
    """

    time_s: float
    answers: int
    met: int
    p50_ms: float
    p99_ms: float
    batches: int
    changes: int
    lag_ms: float
    memory_mb: float


class Counting(Wrapper):
    """Wraps an engine, and counts its batches and its changes of the subnet.

    Attributes:
      batches: the number of batches.
      changes: the number of batches with another subnet than the previous batch.
    """

    def __init__(self, inner: Engine):
        super().__init__(inner)
        self.batches = self.changes = 0
        self._last: Subnet | None = None

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `engines.base.Engine.run`."""
        self.batches += 1
        self.changes += subnet is not self._last
        self._last = subnet
        return super().run(subnet, batch_size, inputs)


class EnduranceTraffic:
    """Submits Poisson arrivals whose rate rises and falls, with several SLOs and floors. Reports on each second.

    Args:
      target: an open server.
      engines: the engines of `target`.
      rate_qps: the mean rate in queries per second.
      slo_ms: the shortest SLO. The others are `SLO_FACTORS` times as long.
      seed: the seed of arrivals, inputs, SLOs and floors.

    Attributes:
      submitted: the number of accepted queries.
      refused: the number of queries that a full queue refused.
      resolved: the number of futures that resolved.
      failed: the number of futures that resolved with an error.
    """

    def __init__(self, target: Server, engines: Sequence[Counting], *, rate_qps: float, slo_ms: float, seed: int):
        self.submitted = self.refused = self.resolved = self.failed = 0
        self._target, self._engines = target, engines
        self._rate_qps, self._slos_ms = rate_qps, [factor * slo_ms for factor in SLO_FACTORS]
        self._floors = [row.accuracy for row in target.profile.rows]
        self._rng = np.random.default_rng(seed)
        self._inputs = make_inputs(engines[0], self._rng)
        self._replies: collections.deque[tuple[float, bool]] = collections.deque()  # latency in ms, whether it met the SLO
        self._batches = self._changes = 0

    def second(self, number: int, start_s: float) -> Second:
        """Serves one second of traffic.

        Args:
          number: the number of this second, counted from 0.
          start_s: the start of second 0 on the clock `time.monotonic`.

        Raises WorkersLostError if all workers are lost.
        """
        rng = self._rng
        count = rng.poisson(self._rate_qps * (1 + SWING * math.sin(2 * math.pi * number / PERIOD_S)))
        floors = np.where(rng.random(count) < FLOORED, rng.choice(self._floors, count), 0.0)
        trace = Trace(np.sort(rng.random(count)), rng.choice(self._slos_ms, count), floors)
        inputs = [self._inputs[i] for i in rng.integers(len(self._inputs), size=count)]
        lag_s = 0.0
        for sent in loadgen.submit_when_due(self._target, trace, inputs, start_s=start_s + number):
            lag_s = max(lag_s, sent.now_s - trace.arrivals_s[sent.places[0]])
            if isinstance(sent.error, errors.WorkersLostError):
                raise sent.error
            if sent.answers is None:
                self.refused += len(sent.places)
                continue
            self.submitted += len(sent.answers)
            for query in sent.answers:
                query.add_done_callback(self._on_done)
        time.sleep(max(start_s + number + 1 - time.monotonic(), 0.0))
        return self._take(time.monotonic() - start_s, lag_s)

    def wait(self, timeout_s: float) -> None:
        """Waits until every query has resolved, but not longer than `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while self.resolved < self.submitted and time.monotonic() < end_s:
            time.sleep(0.01)
            self._take(0.0, 0.0)

    def _on_done(self, query: Future) -> None:
        if query.exception(timeout=0) is not None:
            self._replies.append((math.nan, False))
        else:
            reply = query.result(timeout=0)
            self._replies.append((reply.latency_ms, reply.met_slo))

    def _take(self, time_s: float, lag_s: float) -> Second:
        resolved = np.array([self._replies.popleft() for _ in range(len(self._replies))]).reshape(-1, 2)
        latencies_ms, met = resolved[~np.isnan(resolved[:, 0])].T
        self.resolved += len(resolved)
        self.failed += len(resolved) - len(latencies_ms)
        p50, p99 = np.percentile(latencies_ms, [50, 99]) if len(latencies_ms) else (math.nan, math.nan)
        batches, changes = (sum(getattr(engine, name) for engine in self._engines) for name in ("batches", "changes"))
        second = Second(
            time_s=time_s,
            answers=len(latencies_ms),
            met=int(met.sum()),
            p50_ms=float(p50),
            p99_ms=float(p99),
            batches=batches - self._batches,
            changes=changes - self._changes,
            lag_ms=1e3 * lag_s,
            memory_mb=resident_mb(),
        )
        self._batches, self._changes = batches, changes
        return second


def carried_qps(profile: Profile) -> float:
    """Queries per second that one worker can serve if all subnets get equally many queries, each at its best batch size.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> speeds = [profile.throughput_qps(row.subnet) for row in profile.rows]
    >>> min(speeds) < carried_qps(profile) < max(speeds)
    True
    """
    return len(profile.rows) / sum(1 / profile.throughput_qps(row.subnet) for row in profile.rows)


def resident_mb() -> float:
    """Resident memory of this process in MB (10^6 bytes)."""
    return 1e-6 * psutil.Process().memory_info().rss


def make_inputs(target: Engine, rng: np.random.Generator, count: int = 256) -> list[np.ndarray]:
    """Random inputs: images of random pixels, or texts of random lengths that repeat one token."""
    shape, dtype = target.input_shape, target.input_dtype
    if target.lengths:
        token = target.pad_id + 1
        return [np.full(rng.integers(1, target.lengths[-1] + 1), token, dtype) for _ in range(count)]
    return [rng.integers(0, 256, shape).astype(dtype) for _ in range(count)]


def windows(seconds: Sequence[Second], name: str) -> list[float]:
    """The median of a field over each `PERIOD_S` seconds. An incomplete last period is left out."""
    values = [getattr(second, name) for second in seconds]
    return [float(np.nanmedian(values[i : i + PERIOD_S])) for i in range(0, len(values) - PERIOD_S + 1, PERIOD_S)]


def growth(values: Sequence[float]) -> tuple[float, float]:
    """How much values grow from the first to the last, as a fraction of their median, and the p-value of that growth.

    The growth comes from the Theil-Sen slope, which a few outliers do not change. The p-value comes from Kendall's tau: the
    probability of a trend as strong as this one if the order were random. It is NaN if all values are equal.

    >>> [round(float(figure), 3) for figure in growth([10.0, 11.0, 12.0, 99.0, 14.0])]
    [0.333, 0.042]
    """
    places = np.arange(len(values))
    slope, *_ = stats.theilslopes(values, places)
    chance: Any = stats.kendalltau(places, values, alternative="greater")[1]
    return float(slope * places[-1] / np.median(values)), float(chance)
