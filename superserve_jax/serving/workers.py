"""What each worker of a `Server` does: it pulls a batch from the one queue, runs it, and answers. No jax.

`server.py` opens with the map of threads and locks. How workers come and go stands in `crew.py`, what happens when a batch
fails in `failing.py`. Methods named `_locked_...` expect the caller to hold the lock.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.admission import Admission
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.policies import Policy
from superserve_jax.scheduling.queue import Queue
from superserve_jax.serving import futures, retries
from superserve_jax.serving.failing import Failing
from superserve_jax.serving.futures import Query, Reply
from superserve_jax.serving.limits import QueueLimits
from superserve_jax.serving.options import Options
from superserve_jax.serving.retries import Retry
from superserve_jax.serving.roster import Flight, Successor, Worker

_log = logging.getLogger(__name__)

_NEARLY = 0.9  # of a batch's latency, after which the next one is taken
_LEARNED = 0.2  # weight of the last batch in what is estimated from the last ones
_AT_ONCE_S = 2e-5  # who waits for a device no longer than that has come too late,
_CUT = 0.8  # and if it had slept before, this is what is left of its pace;
_LEAST_PACE = 1e-2  # which grows in proportion, and so could not from 0
_LEAST_HOST_S = 1e-4  # at least so much more may be learned at once, although one outlier must not count for much
_NOT_ADMITTED = (
    "what waits leaves no time to meet the deadline, and this server admits no query that it would miss (admission=True); "
    "allow a longer slo_ms, submit more slowly, or add devices"
)


class _Refused(NamedTuple):
    """What a worker has taken and does not run.

    Args:
      expired: dropped (`expire`).
      unlucky: they, because of the policy's `failure`.
    """

    expired: Sequence[Query]
    unlucky: Sequence[Query]
    failure: BaseException | None


def _learn_pace(worker: Worker, took: float | None) -> None:
    """A batch took so many times what its profile says; None where the device was done before the worker had slept enough.

    The pace follows a faster device soon, since answers would be late, and a slower one slowly.
    """
    if took is None:
        worker.pace *= _CUT
    else:
        more = took - worker.pace
        worker.pace += more / 2 if more < 0 else _LEARNED**2 * min(more, worker.pace)
    worker.pace = max(worker.pace, _LEAST_PACE)


def refill(waiting: Queue, profile: Profile, row: Row, batch: list[Query]) -> list[Query]:
    """A batch of `next_batch` with what comes next, and is no longer, in the places of its cancelled queries."""
    if not any(map(futures.resolved, batch)):
        return batch
    live = [query for query in batch if not query.done()]
    longest = profile.at_length(max(query.length for query in batch)).lengths[-1] if len(profile.lengths) > 1 else 0
    while len(live) < len(batch) and len(waiting) and waiting.head_length <= longest:
        more = waiting.pop(len(batch) - len(live), row.accuracy)
        if not more:
            break
        live += [query for query in more if not query.done()]
    return live


class Pool(Failing):
    """Queue, workers and watchdog of one server. Its threads refer to the pool, never to the `Server`, so that a server
    that nobody holds any more can be collected and then closes.

    Args:
      profiles: of each engine.
      make_policy: makes the policy for a profile: of a worker, and of one whose batches have to be smaller.
      input_bytes: of one input, at the longest length.
      pause_s: how long a worker rests after a failure.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        profiles: Sequence[Profile],
        make_policy: Callable[[Profile], Policy],
        settings: Options,
        *,
        input_bytes: int,
        pause_s: float,
    ):
        super().__init__(profiles, make_policy, settings, pause_s=pause_s)
        self._has_lengths = len(profiles[0].lengths) > 1  # as those of all
        self._bounds = QueueLimits(
            profiles[0].lengths if self._has_lengths else (),
            max_queue=settings.max_queue,
            max_queue_bytes=settings.max_queue_bytes,
            input_bytes=input_bytes,
        )
        self._admission = Admission(profiles[0]) if settings.admission else None
        self._expire, self._telemetry = settings.expire, settings.telemetry
        self._idle = 0  # workers that wait on _work
        self._waking = False  # one of them has been notified and has not run yet
        for e, profile in zip(engines, profiles, strict=True):
            self.add(e, profile)
        self._watchdog.start()

    # -- called by clients --------------------------------------------------------------------------------------------------

    def admit(self, queries: Sequence[Query]) -> None:
        """Queues all of `queries`, which share deadline and floor, or raises and queues none."""
        self._check_process()
        with self._lock:
            self._counters.arrived += len(queries)
            if self._closing.is_set():
                raise errors.ServerClosedError("the server is closed and takes no queries; open a new one")
            if not self._alive:
                raise self._lost_error()
            if queries:
                first = queries[0]
                if first.floor > self.best:  # since the client looked
                    raise self._floor_error(first)
                lengths = [query.length for query in queries] if self._has_lengths else ()
                self._bounds.check(self._queue, len(queries), lengths)
                self._meter.shorten(first.submitted_s, 1e3 * (first.deadline_s - first.submitted_s))
                if self._admission is not None and not self._admission.admits(
                    self._queue,
                    self._fleet,
                    first.submitted_s,
                    first.deadline_s,
                    shortest_ms=self._meter.slo_ms,
                    count=len(queries),
                    floor=first.floor,
                    length=max(lengths, default=0),
                    idle=self._idle > 0 and not len(self._queue),
                ):
                    raise errors.AdmissionError(_NOT_ADMITTED)
                self._queue.push_all(first.deadline_s, queries, first.floor, lengths)
            self._counters.admitted += len(queries)
            self._locked_wake()

    def _locked_swap(self, pairs: Sequence[tuple[Worker, Successor]]) -> None:
        super()._locked_swap(pairs)
        if self._admission is not None:
            self._admission = Admission(pairs[0][1].profile)

    def snapshot(self) -> dict[str, Any]:
        """See `Server.snapshot`."""
        if not self._telemetry:
            raise errors.ConfigError("a server with telemetry=False counts no batches; open it with telemetry=True")
        return super().snapshot()

    # -- the worker threads -------------------------------------------------------------------------------------------------

    def _work_on(self, worker: Worker) -> None:
        try:
            while self._turn(worker):
                pass
        except BaseException as error:  # a bug here, since engines, policies and callbacks are caught where they are called
            _log.exception("worker %s ends", worker.name)
            worker.last_error = self._last_error = error
        finally:
            self._drop([worker], "left", self._lost_error)
            # The health of a worker that has left is there to be read, but must not keep its device's memory: neither by the
            # engine, nor by the frames of its last error, which has been logged.
            del worker.engine
            if worker.last_error is not None:
                retries.forget_frames(worker.last_error)

    def _turn(self, worker: Worker) -> bool:
        """Takes a batch if there is one, and answers one. False when the worker is to leave."""
        flight = refused = None
        with self._lock:
            if worker.landed or worker.successor is not None:
                self._locked_settle(worker)
            first = worker.flights[0] if worker.flights else None
            if first is None:
                if not self._locked_wait(worker):
                    return False
                now_s = self._clock()
                flight, refused = self._locked_take(worker, now_s, now_s)
        if first is not None:
            return self._turn_ahead(worker, first)
        if refused:
            self._refuse(*refused)
        if flight is None:
            return True
        if worker.overlap:
            self._launch(worker, flight)
            return True  # there is time until it is nearly due
        return self._land(worker, flight)

    def _locked_settle(self, worker: Worker) -> None:
        """Lets go of a flight that has been answered, and counts it: only now, or the lock would be taken once more for it."""
        if worker.landed:
            worker.landed = False
            if worker.flights:  # else it has been abandoned meanwhile
                del worker.flights[0]
            if worker.flights:
                worker.next_begins(worker.free_s, self._clock())
            if worker.answered:
                self._counters.add(worker.answered)
                worker.answered = ()
        if worker.successor is not None and not worker.flights:
            self._locked_take_up(worker, worker.successor)

    def _locked_wait(self, worker: Worker) -> bool:
        """Waits until there is work. False when the worker is to leave."""
        while worker.alive and not len(self._queue) and not self._locked_retry(worker):
            if self._closing.is_set():
                return False
            self._idle += 1
            self._work.wait()
            self._idle -= 1
            self._waking = False
            if worker.successor is not None:
                self._locked_take_up(worker, worker.successor)
        return worker.alive

    def _locked_take(self, worker: Worker, now_s: float, begin_s: float) -> "tuple[Flight | None, _Refused | None]":
        """Decides about a batch and takes it, and what cannot run, from where it waits; at `begin_s` the device can begin.

        Where the policy fails, the batch that it was asked about suffers.
        """
        retry = self._locked_retry(worker)
        expired = self._locked_prune(now_s)
        waiting, meter = (self._queue, self._meter) if retry is None else (retry.waiting, retry.meter)
        flight = failure = None
        batch = unlucky = ()
        if len(waiting):
            try:
                pace = self._fleet.pace(worker.index)
                turn = Turn(waiting, meter, worker.policy, worker.profile, pace, worker.last_subnet, worker.index)
                row, batch, reason = dispatch.next_batch(turn, begin_s)
                batch = refill(waiting, worker.profile, row, batch)
            except Exception as error:
                _log.exception("the policy failed")
                self._last_error = failure = error
                unlucky = [query for query in waiting.pop(self._batch_sizes[-1]) if not query.done()]
                self._counters.failed += len(unlucky)
            else:
                worker.last_subnet = row.subnet
                if batch:
                    flight = Flight(row, batch, self._padded[len(batch)], retry, reason, now_s)
                    if not worker.flights:
                        worker.watched_s = now_s
                    worker.flights.append(flight)
            if retry is not None:
                self._retries.taken(retry)
        self._locked_wake()
        return flight, _Refused(expired, unlucky, failure) if expired or unlucky else None

    def _locked_prune(self, now_s: float) -> list[Query]:
        """Takes from the front of the queue what need not run: cancelled queries, and with `expire` the hopeless, which
        are returned. A cancelled query counts as waiting until it reaches the front, of the deferred ones if it is one, or the
        queue is full."""
        expired = []
        if self._expire:
            expired = [query for query in self._queue.pop_before(now_s + self._fastest_s) if not query.done()]
            self._counters.expired += len(expired)
        self._queue.drop_late(Query.done)
        while (head := self._queue.head()) is not None and head.done():
            self._queue.pop(1)
        return expired

    def _refuse(self, expired: Sequence[Query], unlucky: Sequence[Query], failure: BaseException | None) -> None:
        """Answers what was taken and does not run."""
        for query in expired:
            query.set_exception(
                errors.DeadlineExpiredError(
                    "dropped, since its deadline could no longer be met (expire=True); "
                    "allow a longer slo_ms, submit more slowly, or serve late with expire=False"
                )
            )
        for query in unlucky:
            query.set_exception(retries.caused(errors.InferenceError(f"the policy failed: {failure!r}; mend it"), failure))

    # -- with `overlap`: what the host does while the device computes -------------------------------------------------------

    def _turn_ahead(self, worker: Worker, first: Flight) -> bool:
        """Takes the next batch when the first is nearly due, and then answers that. False when the worker is to leave."""
        if first.refused is not None:
            return self._land(worker, first)
        flight = refused = None
        slept, wake_s, due_s = self._sleep_until_nearly_due(worker, first)
        with self._lock:
            # One that is to leave, or to change over, first answers what it has, and so does one that has just failed.
            goes_on = worker.alive and worker.overlap and worker.successor is None and not worker.failures
            if goes_on and (len(self._queue) or self._locked_retry(worker)):
                now_s = self._clock()
                flight, refused = self._locked_take(worker, now_s, max(now_s, due_s))
        if refused:
            self._refuse(*refused)
        if flight is not None:
            first.shared = flight.shared = True
            self._launch(worker, flight)
            worker.host_s += _LEARNED * (min(self._clock() - wake_s, 2 * worker.host_s + _LEAST_HOST_S) - worker.host_s)
        return self._land(worker, first, slept=slept)

    def _sleep_until_nearly_due(self, worker: Worker, flight: Flight) -> tuple[bool, float, float]:
        """Returns in time to take the next batch and hand it over before the device has nothing to do; no sooner, since what
        comes until then should have a say. Returns whether it slept, when that is, and when the device will be done.

        A device that is sooner done than it was of late makes the answers late by what it was, so a tenth is kept back.
        """
        latency_s = 1e-3 * flight.row.latency_ms[flight.place] * worker.pace
        wake_s, now_s = flight.started_s + _NEARLY * latency_s - worker.host_s, self._clock()
        if wake_s > now_s:
            time.sleep(wake_s - now_s)
        return wake_s > now_s, max(wake_s, now_s), flight.started_s + latency_s

    def _launch(self, worker: Worker, flight: Flight) -> None:
        """Hands a batch to the device."""
        size, inputs = self._batch_sizes[flight.place], [query.inputs for query in flight.batch]
        flight.started_s = self._clock()
        if not flight.shared:
            worker.watched_s = flight.started_s
        try:
            flight.launched = worker.engine.launch(flight.row.subnet, size, inputs)  # type: ignore[attr-defined]
        except BaseException as error:  # it fails in its turn, after what was launched before
            flight.refused = error

    # -- answers ------------------------------------------------------------------------------------------------------------

    def _land(self, worker: Worker, flight: Flight, *, slept: bool = False) -> bool:
        """Waits for a batch's outputs and answers it. False when the worker is to leave.

        Args:
          slept: whether the worker did until now, so that the device may have been done sooner.
        """
        row, batch, place = flight.row, flight.batch, flight.place
        subnet, accuracy, count = row.subnet, row.accuracy, len(batch)
        too_late, ready_s = False, None
        try:
            if flight.refused is not None:
                raise flight.refused
            if flight.launched is not None:
                asked_s = self._clock()
                flight.launched.wait()
                ready_s = self._clock()
                too_late = slept and ready_s - asked_s < _AT_ONCE_S
                outputs = flight.launched.outputs()
            else:
                inputs = [query.inputs for query in batch]
                flight.started_s = worker.watched_s = self._clock()
                outputs = worker.engine.run(subnet, self._batch_sizes[place], inputs)
            outputs = list(outputs)
            if len(outputs) != count:
                raise errors.InferenceError(f"{len(outputs)} outputs for {count} inputs; an engine returns one for each")
        except BaseException as error:
            return self._failed(worker, flight, error)
        finish_s, start_s = self._clock(), flight.started_s
        worker.free_s, worker.landed = finish_s if ready_s is None else ready_s, True
        worker.failures = 0
        worker.batches += 1
        compute_ms, profiled_ms = 1e3 * (finish_s - start_s), row.latency_ms[place]
        if worker.present and not too_late:  # else another may have its index by now
            self._fleet.observe(worker.index, profiled_ms, compute_ms)
        if ready_s is not None:
            _learn_pace(worker, None if too_late else 1e3 * (ready_s - start_s) / profiled_ms)
        # Where this worker has been abandoned meanwhile, its queries drop these answers, unless they still wait for another.
        # As much as can be is done before the first answer, after which its client wants the interpreter, too.
        slack_s, submitted_s = batch[0].deadline_s - start_s, [query.submitted_s for query in batch] if self._telemetry else []
        late, turned_away = 0, []
        make = Reply._make  # half the cost of the constructor
        for query, output in zip(batch, outputs, strict=True):
            queue_ms = 1e3 * (start_s - query.submitted_s)
            met_slo = finish_s <= query.deadline_s
            reply = make((output, subnet, accuracy, met_slo, queue_ms + compute_ms, queue_ms, compute_ms, count))
            if not query.set_result(reply):
                turned_away.append(query)
            elif not met_slo:
                late += 1
        if turned_away:
            submitted_s = [query.submitted_s for query in batch if query not in turned_away]
        if self._telemetry:
            worker.answered = (subnet, count, submitted_s, late, start_s, finish_s, slack_s, flight.reason)
        return True

    # -- what any thread may do ---------------------------------------------------------------------------------------------

    def _locked_retry(self, worker: Worker) -> Retry | None:
        """What has failed, and is for this worker to run again. It comes first, since it has waited for longer."""
        if not self._retries.groups:
            return None
        return self._retries.find(worker.index, workers=1 if self._closing.is_set() else self._alive)

    def _locked_wake(self) -> None:
        """Wakes one idle worker if there is work; it wakes the next. With one on its way, more would fight for the lock."""
        if self._idle and not self._waking and len(self._queue):
            self._waking = True
            self._work.notify()
