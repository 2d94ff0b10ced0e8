"""An open-loop load generator: submits a trace's queries to a real server when they are due, whatever the server does.

It runs in the calling thread, wakes up at most every millisecond and submits all that is due. Latencies and deadlines count
from the time at which a query was due, not from when the generator got round to it, so a late generator is never to the
server's advantage; its lateness is reported.
"""

import concurrent.futures
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from superserve_jax import errors
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.simulation.traces import Trace

_WAKE_UP_S = 1e-3
_LEAD_S = 0.05  # between the call and the trace's zero


@dataclasses.dataclass(frozen=True)
class Replay:
    """What became of every query of a trace, in the order of arrival; arrays of shape (queries,).

    Args:
      arrival_s, deadline_s: as in the trace.
      finish_s: when it was answered; infinite where it was not.
      accuracy: profiled accuracy of the subnet that answered, a fraction; NaN where none did.
      batch: queries in its batch; NaN where it was not answered.
      label: index of the largest output; -1 where it was not answered.
      lateness_s: by how much the generator was late with each query; infinite where the server refused it.
      start_s: the trace's zero on the clock `time.monotonic`.
      lengths, floors: as in the trace.
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
        """Which queries were answered by their deadline."""
        return self.finish_s <= self.deadline_s


class Submission(NamedTuple):
    """Queries that were due and were submitted together.

    Args:
      start_s: the trace's zero on the clock `time.monotonic`.
      now_s: when they were submitted, from that zero.
      places: which queries of the trace, in order.
      answers: their futures; None where the server refused them because its queue is full or its workers are lost.
    """

    start_s: float
    now_s: float
    places: Sequence[int]
    answers: list[Future] | None


def submit_when_due(target: Server, trace: Trace, inputs: Sequence[Any]) -> Iterator[Submission]:
    """Submits a trace's queries to an open server in the calling thread, all that are due at each wake-up, 1 ms apart.

    Args and Raises: see `replay`. What the caller does between two submissions makes the next one late.
    """
    if not len(trace):
        raise errors.DataError(f"trace '{trace.name}' holds no query; replay one that does, or a longer time of it")
    arrivals, deadlines = trace.arrivals_s, trace.deadlines_s
    n = len(arrivals)
    slos, floors = np.broadcast_to(trace.slo_ms, n), np.broadcast_to(trace.floors, n)
    alike = bool((slos == slos[0]).all() and (floors == floors[0]).all())
    start = time.monotonic() + _LEAD_S
    done, wake_up = 0, 0.0
    while done < n:
        now = time.monotonic() - start
        due = int(np.searchsorted(arrivals, now, side="right")) if now >= wake_up else done
        if due == done:
            time.sleep(max(arrivals[done] - now, wake_up - now, 0.0))
            continue
        wake_up = now + _WAKE_UP_S  # not at every arrival: waking up takes longer than submitting dozens of queries
        groups: dict[tuple[float, float], list[int] | range] = {}
        if alike:
            groups[slos[0], floors[0]] = range(done, due)
        else:
            for i, slo_and_floor in enumerate(zip(slos[done:due].tolist(), floors[done:due].tolist(), strict=True), done):
                groups.setdefault(slo_and_floor, []).append(i)  # type: ignore[union-attr]
        for (_, floor), group in groups.items():
            # A group shares an SLO: what the earliest of it has left, so that no deadline is later than the trace's.
            left_ms = max(1e3 * float(deadlines[group[0]] - now), 1e-3)
            try:
                answers = target.submit_many([inputs[i] for i in group], slo_ms=left_ms, min_accuracy=float(floor))
            except (errors.QueueFullError, errors.WorkersLostError):
                answers = None
            yield Submission(start, now, group, answers)
        done = due


def replay(target: Server, trace: Trace, inputs: Sequence[Any]) -> Replay:
    """Replays a trace on an open server; returns when the last deadline has passed.

    What is unanswered by then has missed its deadline and is not waited for; so has what the server refuses because its queue
    is full or its workers are lost. All futures are kept until then; lest the server stand still while ever more of them are
    looked through for garbage, none is collected meanwhile.

    Args:
      target: the server; its queue should hold the whole trace.
      trace: the arrivals, with the SLO and the floor of each.
      inputs: one per query; they have the lengths that the trace says, if it does.

    Raises:
      DataError: the trace holds no query. AccuracyFloorError: no subnet of the server reaches one of its floors.
    """
    submitted = np.full(len(trace), np.inf)
    pending: list[Future | None] = [None] * len(trace)
    start = 0.0
    collects = gc.isenabled()
    gc.disable()
    try:
        for sent in submit_when_due(target, trace, inputs):
            start = sent.start_s
            if sent.answers is not None:
                submitted[sent.places] = sent.now_s
                for i, future in zip(sent.places, sent.answers, strict=True):
                    pending[i] = future
        time.sleep(max(0.0, start + float(trace.deadlines_s.max()) - time.monotonic()))
    finally:
        if collects:
            gc.enable()
    return _collect(trace, submitted, pending, start)


def _collect(trace: Trace, submitted: np.ndarray, pending: Sequence[Future | None], start_s: float) -> Replay:
    n = len(trace)
    finish, accuracy, batch = np.full(n, np.inf), np.full(n, np.nan), np.full(n, np.nan)
    label = np.full(n, -1)
    for i, future in enumerate(pending):
        if future is None or not future.done():
            continue
        try:
            reply = future.result(timeout=0)
        except (concurrent.futures.CancelledError, Exception):
            continue  # an error is an unanswered query; the server's health says which errors there were
        finish[i] = submitted[i] + 1e-3 * reply.latency_ms
        accuracy[i], batch[i], label[i] = reply.accuracy, reply.batch, int(np.argmax(reply.output))
    lateness = submitted - trace.arrivals_s
    answers = (finish, accuracy, batch, label)
    return Replay(trace.arrivals_s, trace.deadlines_s, *answers, lateness, start_s, trace.lengths, trace.floors)
