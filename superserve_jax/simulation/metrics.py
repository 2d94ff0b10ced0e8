"""The paper's metrics of finished traffic, real or simulated. SLO attainment is computed here and nowhere else. No jax.

All arguments are arrays of shape [queries]:

    arrival_s, deadline_s, finish_s   times on one clock; `finish_s` is infinite for a query that was never answered
    accuracy                          profiled accuracy of the subnet that answered; any value if the query was not answered
    batch                             number of queries in the query's batch; any value if the query was not answered
"""

import dataclasses
import math

import numpy as np

from superserve_jax import errors


@dataclasses.dataclass(frozen=True)
class ReplaySummary:
    """The metrics of a whole run. A mean or percentile over no queries is NaN.

    Args:
      queries: number of submitted queries, answered or not.
      attainment: see `attainment`.
      accuracy: see `mean_accuracy`.
      p50_ms: median latency of the answered queries.
      p99_ms: 99th percentile of the same latencies.
      throughput_qps: answered queries per second, from the first arrival to the last answer.
      goodput_qps: queries per second that met their deadline.
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
    """The metrics of a run over time, for a plot. Each element describes the queries that ARRIVED in one window; NaN if none.

    Args:
      time_s: [windows] middle of each window.
      rate_qps: [windows] arrivals per second.
      attainment: [windows] fraction of the queries that met their deadline.
      accuracy: [windows] mean profiled accuracy over the queries that met their deadline.
      batch: [windows] mean of the number of queries in a query's batch, over the answered queries.
      p99_ms: [windows] 99th percentile of the latency of the answered queries.
    """

    time_s: np.ndarray
    rate_qps: np.ndarray
    attainment: np.ndarray
    accuracy: np.ndarray
    batch: np.ndarray
    p99_ms: np.ndarray


def attainment(deadline_s: np.ndarray, finish_s: np.ndarray) -> float:
    """SLO attainment: the fraction of all queries that were answered by their deadline; 1 without queries.

    >>> attainment(np.array([1.0, 1.0]), np.array([0.5, np.inf]))
    0.5
    """
    return float((finish_s <= deadline_s).mean()) if len(deadline_s) else 1.0


def mean_accuracy(deadline_s: np.ndarray, finish_s: np.ndarray, accuracy: np.ndarray) -> float:
    """Mean serving accuracy: the mean of `accuracy` over the queries that met their deadline (paper, Section 6), or NaN."""
    met = finish_s <= deadline_s
    return float(accuracy[met].mean()) if met.any() else math.nan


def summary(arrival_s: np.ndarray, deadline_s: np.ndarray, finish_s: np.ndarray, accuracy: np.ndarray) -> ReplaySummary:
    """The metrics of a run. Raises DataError if there are no queries.

    >>> s = summary(*map(np.array, ([0.0, 1.0], [0.5, 1.5], [0.25, 2.0], [0.7, 0.8])))
    >>> s.attainment, s.accuracy, s.throughput_qps, s.goodput_qps
    (0.5, 0.7, 1.0, 0.5)
    """
    _check_queries(arrival_s)
    met, answered = finish_s <= deadline_s, np.isfinite(finish_s)
    latency_ms = 1e3 * (finish_s - arrival_s)[answered]
    p50, p99 = np.percentile(latency_ms, [50, 99]) if answered.any() else (math.nan, math.nan)
    span_s = finish_s[answered].max() - arrival_s.min() if answered.any() else math.inf
    return ReplaySummary(
        queries=len(arrival_s),
        attainment=attainment(deadline_s, finish_s),
        accuracy=mean_accuracy(deadline_s, finish_s, accuracy),
        p50_ms=float(p50),
        p99_ms=float(p99),
        throughput_qps=float(answered.sum() / span_s),
        goodput_qps=float(met.sum() / span_s),
    )


def series(
    arrival_s: np.ndarray,
    deadline_s: np.ndarray,
    finish_s: np.ndarray,
    accuracy: np.ndarray,
    batch: np.ndarray,
    *,
    window_s: float,
) -> Series:
    """The metrics over time, in windows of `window_s` seconds from the first arrival. Raises DataError like `summary`.

    >>> run = [0.0, 0.5, 1.5], [1.0, 1.0, 2.0], [0.5, 3.0, 1.75], [0.7, 0.8, 0.9], [1, 1, 4]
    >>> s = series(*map(np.array, run), window_s=1.0)
    >>> s.rate_qps.tolist(), s.attainment.tolist(), s.accuracy.tolist(), s.batch.tolist(), s.p99_ms.tolist()
    ([2.0, 1.0], [0.5, 1.0], [0.7, 0.9], [1.0, 4.0], [2480.0, 250.0])
    """
    _check_queries(arrival_s)
    met, answered = finish_s <= deadline_s, np.isfinite(finish_s)
    start_s = arrival_s.min()
    window = ((arrival_s - start_s) // window_s).astype(int)
    windows = int(window.max()) + 1

    def total(which: np.ndarray | slice, values: np.ndarray | None = None) -> np.ndarray:
        weights = None if values is None else values[which]
        return np.bincount(window[which], weights, minlength=windows)

    order = np.flatnonzero(answered)[np.argsort(window[answered], kind="stable")]
    latencies_ms = np.split(1e3 * (finish_s - arrival_s)[order], np.cumsum(total(answered))[:-1])
    p99_ms = np.array([np.percentile(ms, 99) if len(ms) else math.nan for ms in latencies_ms])
    arrived = total(slice(None))
    with np.errstate(invalid="ignore"):  # an empty window gives 0 / 0 = NaN
        return Series(
            time_s=start_s + window_s * (np.arange(windows) + 0.5),
            rate_qps=arrived / window_s,
            attainment=total(met) / arrived,
            accuracy=total(met, accuracy) / total(met),
            batch=total(answered, batch) / total(answered),
            p99_ms=p99_ms,
        )


def _check_queries(arrival_s: np.ndarray) -> None:
    if not len(arrival_s):
        raise errors.DataError("no queries to summarise; submit at least one")
