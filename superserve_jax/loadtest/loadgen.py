"""An open-loop load generator: it submits the queries of a trace when they are due, however late the answers are. No jax.

It runs in the calling thread. At most once a millisecond it wakes up and submits all queries that are due. Latencies and
deadlines count from the time at which a query was due. So a late generator never helps the server. Its lateness is reported.
"""

import dataclasses
import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile, Row, check_batch_sizes
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import State
from superserve_jax.serving.futures import Future
from superserve_jax.simulation import metrics, simulator
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.metrics import ReplaySummary, Series
from superserve_jax.simulation.patience import Patience
from superserve_jax.simulation.simulator import SimulationResult
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

_WAKE_UP_S = 1e-3
_REHEARSED = 2_000  # queries of a trace with which a user's policy is tried
_WAITING, _SLACKS_MS = (1, 10_000), (-1_000.0, 0.0)  # extreme states in which it is tried before
_STALL_S = 5.0  # for one decision
_LEAD_S = 0.05  # from the call to the trace's zero


class Target(Protocol):
    """The receiver of queries: a `Server`, or an object that passes them on to one."""

    def submit_many(self, xs: list[Any], *, slo_ms: float, min_accuracy: float = 0.0) -> list[Future]:
        """See `serving.server.Server.submit_many`."""
        ...


@dataclasses.dataclass(frozen=True)
class Replay:
    """The outcome of every query of a trace, in the order of arrival. All arrays have the shape (queries,).

    Args:
      arrival_s: the time at which the query was due, as in the trace.
      deadline_s: the deadline, as in the trace.
      finish_s: the time of the answer; infinite without an answer.
      accuracy: the profiled accuracy of the subnet that answered, a fraction; NaN without an answer.
      batch: the number of queries in the batch; NaN without an answer.
      label: the index of the largest output; -1 without an answer.
      lateness_s: the time of submission minus `arrival_s`; infinite if the server refused the query.
      start_s: the trace's zero on the clock `time.monotonic`.
      lengths: the lengths of the inputs, as in the trace.
      floors: the accuracy floors, as in the trace.
    """

    arrival_s: np.ndarray
    deadline_s: np.ndarray
    finish_s: np.ndarray
    accuracy: np.ndarray
    batch: np.ndarray
    label: np.ndarray
    lateness_s: np.ndarray
    start_s: float = 0.0
    lengths: int | np.ndarray = 0
    floors: float | np.ndarray = 0.0

    @property
    def met(self) -> np.ndarray:
        """Whether each query was answered by its deadline."""
        return self.finish_s <= self.deadline_s


class Submission(NamedTuple):
    """Queries that were due and were submitted in one call.

    Args:
      now_s: the time of the call, from the trace's zero.
      places: the indices of the queries in the trace, ascending.
      answers: their futures; None if the server refused them.
      error: why the server refused them: its queue is full, or all its workers are lost.
    """

    now_s: float
    places: Sequence[int]
    answers: list[Future] | None
    error: errors.SuperServeError | None = None


def submit_when_due(
    target: Target, trace: Trace, inputs: Sequence[Any], *, start_s: float | None = None
) -> Iterator[Submission]:
    """Submits a trace in the calling thread: at most once per millisecond, it submits all queries that are due.

    If the caller does slow work between two submissions, the next one is late.

    Args:
      target: an open server.
      trace: the arrivals, with the SLO and the floor of each query.
      inputs: one input per query.
      start_s: the trace's zero on the clock `time.monotonic`; by default 50 ms after the call.
    """
    arrivals, deadlines = trace.arrivals_s, trace.deadlines_s
    n = len(arrivals)
    slos, floors = np.broadcast_to(trace.slo_ms, n), np.broadcast_to(trace.floors, n)
    alike = bool((slos == slos[:1]).all() and (floors == floors[:1]).all())
    start = time.monotonic() + _LEAD_S if start_s is None else start_s
    done, wake_up = 0, 0.0
    while done < n:
        now = time.monotonic() - start
        due = int(np.searchsorted(arrivals, now, side="right")) if now >= wake_up else done
        if due == done:
            time.sleep(max(arrivals[done] - now, wake_up - now, 0.0))
            continue
        wake_up = now + _WAKE_UP_S  # one wake-up takes longer than submitting dozens of queries
        groups: dict[tuple[float, float], list[int] | range] = {}
        if alike:
            groups[slos[0], floors[0]] = range(done, due)
        else:
            for i, slo_and_floor in enumerate(zip(slos[done:due].tolist(), floors[done:due].tolist(), strict=True), done):
                groups.setdefault(slo_and_floor, []).append(i)  # type: ignore[union-attr]
        for (_, floor), group in groups.items():
            # A group gets the remaining time of its earliest query, so no deadline is later than in the trace.
            left_ms = max(1e3 * float(deadlines[group[0]] - now), 1e-3)
            answers = error = None
            try:
                answers = target.submit_many([inputs[i] for i in group], slo_ms=left_ms, min_accuracy=float(floor))
            except (errors.QueueFullError, errors.WorkersLostError) as refusal:
                error = refusal.with_traceback(None)  # a traceback would keep the inputs in memory
            yield Submission(now, group, answers, error)
        done = due


def replay(target: Target, trace: Trace, inputs: Sequence[Any]) -> Replay:
    """Replays a trace on an open server, and returns when the last deadline has passed.

    A query that is not answered by then has missed its deadline. So has a query that the server refuses because its queue is
    full or all its workers are lost. The garbage collector is off meanwhile: it would search all futures again and again.

    Args:
      target: the server. Its queue should have room for the whole trace.
      trace: the arrivals, with the SLO and the floor of each query.
      inputs: one input per query. If the trace has lengths, the inputs have these lengths.

    Raises:
      DataError: the trace has no queries. AccuracyFloorError: no subnet of the server reaches one of the floors.
      PolicyError: the policy failed.
    """
    if not len(trace):
        raise errors.DataError(f"trace '{trace.name}' has no queries; replay another trace, or a longer part of it")
    collects = gc.isenabled()
    gc.disable()
    try:
        start_s = time.monotonic() + _LEAD_S
        submissions = list(submit_when_due(target, trace, inputs, start_s=start_s))
        time.sleep(max(0.0, start_s + float(trace.deadlines_s.max()) - time.monotonic()))
    finally:
        if collects:
            gc.enable()
    n = len(trace)
    finish, accuracy, batch, label = np.full(n, np.inf), np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1)
    lateness = np.full(n, np.inf)
    for sent in submissions:
        if sent.answers is None:
            continue
        lateness[sent.places] = sent.now_s - trace.arrivals_s[sent.places]
        for i, future in zip(sent.places, sent.answers, strict=True):
            if not future.done() or future.cancelled():
                continue
            error = future.exception(0)
            if isinstance(error, errors.PolicyError):
                raise error
            if error is None:  # other failed queries count as unanswered; the server's health names the errors
                reply = future.result(0)
                finish[i] = sent.now_s + 1e-3 * reply.latency_ms
                accuracy[i], batch[i], label[i] = reply.accuracy, reply.batch, int(np.argmax(reply.output))
    answers = (finish, accuracy, batch, label)
    return Replay(trace.arrivals_s, trace.deadlines_s, *answers, lateness, start_s, trace.lengths, trace.floors)


def check_policies(policy_names: Sequence[str], batch_sizes: Sequence[int], *, subnets: int) -> None:
    """Raises ConfigError for a mistyped policy before a profile is known, and so before anything is compiled.

    Built-in policies are made for a profile with made-up latencies. A user's policy is only looked up.

    Args:
      policy_names: names of policies, or "fixed:all".
      batch_sizes: the batch sizes to serve with.
      subnets: the number of subnets.
    """
    rows = (Row(Subnet((i,)), i / subnets, tuple(float((i + 1) * b) for b in batch_sizes)) for i in range(subnets))
    made_up = Profile(check_batch_sizes(batch_sizes), tuple(rows))
    for name in policies.expand(policy_names, subnets=subnets):
        policies.create(name, *([] if policies.is_custom(name) else [made_up]))


def rehearse(policy: str, profiles: Sequence[Profile], trace: Trace) -> None:
    """Tries a user's policy, so that its mistakes show before the replay. It does nothing for a built-in policy.

    The policy decides in a few extreme states, such as negative slack. Then the first 2,000 queries are simulated with it.

    Raises PolicyError if the policy fails.
    """
    if policies.is_custom(policy):
        tried, slo_ms = policies.create(policy, *profiles), float(np.min(trace.slo_ms))
        with Patience(_STALL_S) as watch:
            tables = [table for profile in profiles for table in profile.each_length]
            cases = itertools.product(tables, _WAITING, (*_SLACKS_MS, slo_ms))
            for now_s, (table, waiting, slack_ms) in enumerate(cases):
                state = State(now_s, slack_ms, waiting, workers=len(profiles), slo_ms=slo_ms, near=waiting)
                watch.decide(tried, table, state)
        simulator.simulate(profiles, policy, trace.first(_REHEARSED), cluster=Cluster(len(profiles)))


def examples_of_length(lengths: np.ndarray, wanted: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """For each wanted length, the index of an example whose length is the nearest longer one; the longest if there is none.

    Examples of equal length are drawn at random.

    >>> examples_of_length(np.array([5, 9, 7]), np.array([6, 1, 7, 100])).tolist()
    [2, 0, 2, 1]
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    ascending = lengths[order]
    first = np.minimum(np.searchsorted(ascending, wanted), len(order) - 1)
    alike = np.searchsorted(ascending, ascending[first], side="right") - first
    return order[first + (rng.random(len(first)) * alike).astype(int)]


def summarize(run: Replay | SimulationResult, which: Any = slice(None)) -> ReplaySummary:
    """The metrics of a run.

    Args:
      run: a real or a simulated run.
      which: a slice or a mask of the queries to count; by default all.
    """
    return metrics.summary(*(values[which] for values in (run.arrival_s, run.deadline_s, run.finish_s, run.accuracy)))


def series(run: Replay | SimulationResult, *, window_s: float) -> Series:
    """A real or a simulated run over time, in windows of `window_s` seconds."""
    return metrics.series(run.arrival_s, run.deadline_s, run.finish_s, run.accuracy, run.batch, window_s=window_s)
