"""Traffic that can last for hours, and what a server must not do meanwhile: grow, or become slower. No jax.

Of a query nothing is kept but its latency, and that until the end of the second.
"""

import collections
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.engines.base import Engine, Wrapper
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

SLO_FACTORS = (1, 2, 4)
SWING, PERIOD_S = 0.5, 10
"""The rate goes up and down by half, once in so many seconds."""

FLOORED = 0.03
"""Share of the queries that ask for the accuracy of a subnet, any one: so the accurate ones answer in a burst, too."""

_WAKE_UP_S = 1e-3
_STATM = pathlib.Path("/proc/self/statm")


@dataclasses.dataclass(frozen=True)
class Second:
    """What was seen in one second of traffic.

    Args:
      time_s: its end, from the beginning of the traffic.
      answers: queries that were answered; `failed` ones got an error.
      p50_ms, p99_ms: latencies of the answered; NaN without any.
      attainment: of the answered.
      batches, changes: of all engines, and how many ran another subnet than the one before.
      lag_ms: the longest by which the generator was late.
      memory_mb: resident memory at its end; NaN where the system does not say.
    """

    time_s: float
    answers: int
    failed: int
    p50_ms: float
    p99_ms: float
    attainment: float
    batches: int
    changes: int
    lag_ms: float
    memory_mb: float


class Counting(Wrapper):
    """An engine that counts the batches of another one, the changes of its subnet, and the subnets."""

    def __init__(self, watched: Engine):
        super().__init__(watched)
        self.batches = self.changes = 0
        self.subnets: set[Subnet] = set()
        self._last = None

    def run(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> Sequence[Any]:
        """See `engine.Engine.run`."""
        self.batches += 1
        self.changes += subnet is not self._last
        self.subnets.add(subnet)
        self._last = subnet
        return super().run(subnet, batch_size, inputs)


class EnduranceTraffic:
    """Submits Poisson arrivals of a swinging rate, with several SLOs and floors, and notes what comes back, second by second.

    Args:
      target: an open server.
      engines: those of `target`.
      rate_qps: queries per second on average.
      slo_ms: the shortest SLO; the others are `SLO_FACTORS` times as long.
    """

    def __init__(self, target: Server, engines: Sequence[Counting], *, rate_qps: float, slo_ms: float, seed: int):
        self.submitted = self.refused = self.resolved = self.failed = 0
        self._target, self._engines = target, engines
        self._rate_qps = rate_qps
        self._slos_ms = [factor * slo_ms for factor in SLO_FACTORS]
        self._floors = [row.accuracy for row in target.profile.rows]
        self._rng = np.random.default_rng(seed)
        self._inputs = make_inputs(engines[0], self._rng)
        # Latency in ms, negative where the SLO was missed, NaN for an error; emptied every second.
        self._answers: collections.deque[float] = collections.deque()
        self._batches = self._changes = 0

    def second(self, number: int, start_s: float) -> Second:
        """One second of it; `start_s` is the beginning of the first on the clock time.monotonic."""
        rate_qps = self._rate_qps * (1 + SWING * math.sin(2 * math.pi * number / PERIOD_S))
        arrivals_s = start_s + number + np.sort(self._rng.random(self._rng.poisson(rate_qps)))
        slos = self._rng.choice(self._slos_ms, len(arrivals_s))
        floors = np.where(self._rng.random(len(arrivals_s)) < FLOORED, self._rng.choice(self._floors, len(arrivals_s)), 0.0)
        asked = list(zip(slos.tolist(), floors.tolist(), strict=True))
        chosen = self._rng.integers(len(self._inputs), size=len(arrivals_s))
        done, lag_s = 0, 0.0
        while done < len(arrivals_s):
            now_s = time.monotonic()
            due = int(np.searchsorted(arrivals_s, now_s, side="right"))
            if due == done:
                time.sleep(min(_WAKE_UP_S, arrivals_s[done] - now_s))
                continue
            lag_s = max(lag_s, now_s - arrivals_s[done])
            groups: dict[tuple[float, float], list[np.ndarray]] = {}
            for slo_and_floor, k in zip(asked[done:due], chosen[done:due], strict=True):
                groups.setdefault(slo_and_floor, []).append(self._inputs[k])
            for (slo_ms, floor), inputs in groups.items():
                try:
                    queries = self._target.submit_many(inputs, slo_ms=slo_ms, min_accuracy=floor)
                except errors.QueueFullError:
                    self.refused += len(inputs)
                    continue
                self.submitted += len(queries)
                for query in queries:
                    query.add_done_callback(self._on_done)
            done = due
        time.sleep(max(start_s + number + 1 - time.monotonic(), 0.0))
        return self._take(time.monotonic() - start_s, lag_s)

    def wait(self, timeout_s: float) -> None:
        """Waits until every query has resolved, or for so long."""
        end_s = time.monotonic() + timeout_s
        while self.resolved + len(self._answers) < self.submitted and time.monotonic() < end_s:
            time.sleep(0.01)
        self._take(0.0, 0.0)

    def _on_done(self, query: Future) -> None:
        if query.exception(timeout=0) is not None:
            self._answers.append(math.nan)
            return
        reply = query.result(timeout=0)
        self._answers.append(reply.latency_ms if reply.met_slo else -reply.latency_ms)

    def _take(self, time_s: float, lag_s: float) -> Second:
        answers = np.array([self._answers.popleft() for _ in range(len(self._answers))])
        latencies = np.abs(answers[~np.isnan(answers)])
        self.resolved += len(answers)
        self.failed += len(answers) - len(latencies)
        p50, p99 = np.percentile(latencies, [50, 99]) if len(latencies) else (math.nan, math.nan)
        batches, changes = (sum(getattr(e, name) for e in self._engines) for name in ("batches", "changes"))
        second = Second(
            time_s,
            len(latencies),
            len(answers) - len(latencies),
            float(p50),
            float(p99),
            float((answers > 0).sum() / len(latencies)) if len(latencies) else math.nan,
            batches - self._batches,
            changes - self._changes,
            1e3 * lag_s,
            resident_mb(),
        )
        self._batches, self._changes = batches, changes
        return second


def carried_qps(profile: Profile) -> float:
    """Queries per second of one worker if every subnet serves as many as any other, each at its best batch size.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> speeds = [profile.throughput_qps(row.subnet) for row in profile.rows]
    >>> min(speeds) < carried_qps(profile) < max(speeds)
    True
    """
    return len(profile.rows) / sum(1 / profile.throughput_qps(row.subnet) for row in profile.rows)


def resident_mb() -> float:
    """The resident memory of this process in MB (10^6 bytes); NaN where the system has no /proc."""
    if not _STATM.exists():
        return math.nan
    return 1e-6 * int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_inputs(target: Engine, rng: np.random.Generator, count: int = 256) -> list[np.ndarray]:
    """Made-up inputs: random pixels, or texts of random lengths of one token that is no padding."""
    shape, dtype = target.input_shape, target.input_dtype
    if target.lengths:
        token = target.pad_id + 1
        return [np.full(rng.integers(1, target.lengths[-1] + 1), token, dtype) for _ in range(count)]
    return [rng.integers(0, 256, shape).astype(dtype) for _ in range(count)]


def windows(seconds: Sequence[Second], name: str) -> list[float]:
    """The median of a figure over each `PERIOD_S`; an unfinished last one is left out."""
    values = [getattr(second, name) for second in seconds]
    return [float(np.nanmedian(values[i : i + PERIOD_S])) for i in range(0, len(values) - PERIOD_S + 1, PERIOD_S)]


def growth(values: Sequence[float]) -> tuple[float, float]:
    """By which fraction of their median values grow from the first to the last, and how sure that is.

    The slope is the median of those between all pairs (Theil and Sen), which a few outliers do not move. The second figure is
    Mann's and Kendall's z: without a trend it exceeds 2.33 in one of a hundred series.

    >>> [round(figure, 2) for figure in growth([10.0, 11.0, 12.0, 99.0, 14.0])]
    [0.33, 1.96]
    """
    y = np.asarray(values, np.float64)
    n = len(y)
    i, j = np.triu_indices(n, 1)
    slope = np.median((y[j] - y[i]) / (j - i))
    score = np.sign(y[j] - y[i]).sum()
    return float(slope * (n - 1) / np.median(y)), float(score / math.sqrt(n * (n - 1) * (2 * n + 5) / 18))
