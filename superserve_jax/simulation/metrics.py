"""The paper's metrics of finished traffic, real or simulated, from plain arrays with one element per query. No jax.

Arrays, all [queries]: `arrival_s`, `deadline_s` and `finish_s` on one clock, with an infinite `finish_s` for a query that was
never answered (refused, dropped, failed); `accuracy`, the profiled accuracy of the subnet that answered; `batch`, the number
of queries in its batch. What stands in the last two for an unanswered query does not matter.
"""

import dataclasses
import math

import numpy as np
from numpy import typing as npt

from superserve_jax import errors


@dataclasses.dataclass(frozen=True)
class ReplaySummary:
    """Figures of a whole run; NaN where no query counts towards one.

    Args:
      queries: how many were submitted, answered or not.
      attainment: SLO attainment, the fraction of all queries that was answered by its deadline.
      accuracy: mean serving accuracy, the mean profiled accuracy over the queries that met their deadline (paper, Section 6).
      p50_ms, p99_ms: latency percentiles of the answered queries.
      throughput_qps: answered queries per second, from the first arrival to the last answer.
      goodput_qps: the same, of those that met their deadline.
    """

    queries: int
    attainment: float
    accuracy: float
    p50_ms: float
    p99_ms: float
    throughput_qps: float
    goodput_qps: float


@dataclasses.dataclass(frozen=True)
class Series:
    """A run over time, for a plot: every element describes the queries that ARRIVED in one window; NaN where none counts.

    Args:
      time_s: [windows] middle of each window.
      rate_qps: [windows] arrivals per second.
      attainment: [windows] fraction of them answered by the deadline.
      accuracy: [windows] mean profiled accuracy over those that met the deadline.
      batch: [windows] mean number of queries in the batches of those that were answered.
    """

    time_s: np.ndarray
    rate_qps: np.ndarray
    attainment: np.ndarray
    accuracy: np.ndarray
    batch: np.ndarray


def summary(
    arrival_s: npt.ArrayLike, deadline_s: npt.ArrayLike, finish_s: npt.ArrayLike, accuracy: npt.ArrayLike
) -> ReplaySummary:
    """The figures of a run. Raises DataError where the arrays differ in length or hold no query.

    >>> s = summary([0.0, 1.0], [0.5, 1.5], [0.25, 2.0], [0.7, 0.8])
    >>> s.attainment, s.accuracy, s.throughput_qps, s.goodput_qps
    (0.5, 0.7, 1.0, 0.5)
    """
    arrival, deadline, finish, accuracies = _arrays(
        arrival_s=arrival_s, deadline_s=deadline_s, finish_s=finish_s, accuracy=accuracy
    )
    met, answered = finish <= deadline, np.isfinite(finish)
    latency_ms = 1e3 * (finish - arrival)[answered]
    p50, p99 = np.percentile(latency_ms, [50, 99]) if answered.any() else (math.nan, math.nan)
    span_s = finish[answered].max() - arrival.min() if answered.any() else math.nan
    return ReplaySummary(
        queries=len(arrival),
        attainment=float(met.mean()),
        accuracy=float(accuracies[met].mean()) if met.any() else math.nan,
        p50_ms=float(p50),
        p99_ms=float(p99),
        throughput_qps=float(answered.sum() / span_s) if answered.any() else 0.0,
        goodput_qps=float(met.sum() / span_s) if answered.any() else 0.0,
    )


def series(
    arrival_s: npt.ArrayLike,
    deadline_s: npt.ArrayLike,
    finish_s: npt.ArrayLike,
    accuracy: npt.ArrayLike,
    batch: npt.ArrayLike,
    *,
    window_s: float = 0.1,
) -> Series:
    """The run over time, in windows of `window_s` seconds from the first arrival. Raises as `summary` does.

    >>> s = series([0.0, 0.5, 1.5], [1.0, 1.0, 2.0], [0.5, 3.0, 1.75], [0.7, 0.8, 0.9], [1, 1, 4], window_s=1.0)
    >>> s.rate_qps.tolist(), s.attainment.tolist(), s.accuracy.tolist(), s.batch.tolist()
    ([2.0, 1.0], [0.5, 1.0], [0.7, 0.9], [1.0, 4.0])
    """
    if not 0 < window_s < math.inf:
        raise errors.ConfigError(f"window_s must be a positive number of seconds, got {window_s}")
    arrival, deadline, finish, accuracies, batches = _arrays(
        arrival_s=arrival_s, deadline_s=deadline_s, finish_s=finish_s, accuracy=accuracy, batch=batch
    )
    met, answered = finish <= deadline, np.isfinite(finish)
    start_s = arrival.min()
    window = ((arrival - start_s) // window_s).astype(int)
    windows = int(window.max()) + 1

    def total(which: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        weights = None if values is None else values[which]
        return np.bincount(window[which], weights, minlength=windows)

    arrived = total(np.ones(len(arrival), bool))
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty window is the NaN that is promised
        return Series(
            time_s=start_s + window_s * (np.arange(windows) + 0.5),
            rate_qps=arrived / window_s,
            attainment=total(met) / arrived,
            accuracy=total(met, accuracies) / total(met),
            batch=total(answered, batches) / total(answered),
        )


def _arrays(**columns: npt.ArrayLike) -> list[np.ndarray]:
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    shapes = {name: a.shape for name, a in arrays.items()}
    if len(set(shapes.values())) != 1 or next(iter(arrays.values())).ndim != 1:
        raise errors.DataError(f"one element per query is needed in every array, got shapes {shapes}")
    if not len(next(iter(arrays.values()))):
        raise errors.DataError("no queries to summarise; submit at least one")
    return list(arrays.values())
