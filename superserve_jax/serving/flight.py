"""A batch on its way through a worker: `Flight`, how it fails, and when the next one is taken. No jax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve_jax import errors, foreign
from superserve_jax.engines import base
from superserve_jax.engines.base import Engine, Launched
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.length_queue import Queue
from superserve_jax.serving import futures
from superserve_jax.serving.futures import Query
from superserve_jax.serving.retries import Retry
from superserve_jax.serving.threads import Outbox

if TYPE_CHECKING:
    from superserve_jax.serving.lost import Suspicion

_PATIENCE = 20  # see `Flight.patience_s`
_NEARLY = 0.9  # the next batch is taken after this share of the expected latency
_WEIGHT = 0.2  # weight of the last batch in `host_s`; squared, its weight in `device_s` if the device got slower
_CUT = 0.8  # an estimate in `device_s` shrinks by this factor when the worker woke up too late
_LEAST_S = 1e-5  # an estimate in `device_s` grows in proportion to itself, so it must not reach 0
_LEAST_HOST_S = 1e-4  # one outlier counts as at most 2 * host_s + this time


class Failure(NamedTuple):
    """An error of an engine or a policy, and its `repr`.

    The text is made once, where the error is caught. No lock is held there, since `repr` may run foreign code.

    >>> Failure.of(ValueError("no")).text
    "ValueError('no')"
    """

    error: BaseException
    text: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Makes the failure of an error, even if its `repr` raises."""
        return cls(error, foreign.text_of(error))

    @property
    def out_of_memory(self) -> bool:
        """Whether an engine failed because the batch was too large for its device.

        >>> Failure.of(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")).out_of_memory
        True
        """
        return base.is_out_of_memory(self.error, self.text)

    @property
    def lost(self) -> bool:
        """Whether the engine itself is gone."""
        return isinstance(self.error, errors.EngineLostError)

    @property
    def not_finite(self) -> bool:
        """Whether the outputs were NaN or infinite."""
        return isinstance(self.error, errors.NotFiniteError)

    def cause(self, error: errors.SuperServeError) -> errors.SuperServeError:
        """Returns `error` with this failure's error as its `__cause__`."""
        error.__cause__ = self.error
        return error


def inference_error(query: Query, where: str, why: str, failure: Failure) -> errors.SuperServeError:
    """The error that a query gets when it is given up.

    Args:
      query: the query.
      where: name of the worker on which its last batch failed.
      why: why it is given up.
      failure: the engine's error.
    """
    x = np.asarray(query.inputs)
    held = f", values from {x.min():g} to {x.max():g}" if x.size and x.dtype.kind in "iuf" else ""
    failed = f"{where} failed on the input of shape {x.shape}, dtype {x.dtype}{held}"
    return failure.cause(errors.InferenceError(f"{failed}: {why}. Cause: {failure.text}; see the server's log"))


@dataclasses.dataclass(slots=True, eq=False)
class Flight:
    """A batch, from the moment when it is taken until it is answered or given back.

    Args:
      row: the subnet that the policy chose, with its latencies.
      batch: the queries. Empty for a run with blank inputs, and once all queries have been answered.
      place: index of the padded batch size in the profile's batch sizes.
      retry: the group of failed queries that the batch was taken from; None if it was taken from the queue.
      reason: the policy's reason for this decision (see `policies.Decision`).
      started_s: when the device began with this batch, as far as the host knows.

    Attributes:
      count: number of queries.
      launched: the result of `Overlapping.launch`; None for an engine that runs a batch in one call.
      failure: the error of the engine.
      ready_s: when the device was done with a launched batch.
      waited_s: how long the worker waited until `ready_s`.
      device_s: the time that the device itself took, if the engine tells.
      shared: whether another batch was on the device at the same time.
    """

    row: Row
    batch: Sequence[Query]
    place: int
    retry: Retry | None
    reason: str
    started_s: float
    count: int = dataclasses.field(init=False)
    launched: Launched | None = None
    failure: Failure | None = None
    ready_s: float | None = None
    waited_s: float = 0.0
    device_s: float | None = None
    shared: bool = False

    def __post_init__(self):
        self.count = len(self.batch)

    def patience_s(self, stall_s: float) -> float:
        """After this time the batch counts as stuck: `stall_s`, but at least 20 times its profiled p99."""
        return max(stall_s, 1e-3 * _PATIENCE * self.row.p99_ms[self.place])

    # Only these two methods call an engine, and they catch whatever it raises.

    def launch(self, engine: Engine, size: int) -> None:
        """Hands the batch to the device (see `Overlapping.launch`). An error is kept for `compute`."""
        inputs = [query.inputs for query in self.batch]
        try:
            self.launched = engine.launch(self.row.subnet, size, inputs)  # type: ignore[attr-defined]
        except BaseException as error:
            self.failure = Failure.of(error)

    def compute(
        self,
        engine: Engine,
        size: int,
        clock: Callable[[], float],
        suspicion: "Suspicion",
        blanks: Sequence[Any] = (),
    ) -> list[Any]:
        """Runs the batch, or waits for it if it was launched. Returns the outputs, one for each query.

        If the engine raises, the error is kept in `failure` and the result is an empty list. A flight without queries runs
        the inputs `blanks`. `suspicion` is raised as long as the engine may be lost.
        """
        if self.failure is not None:
            return []
        try:
            if self.launched is None:
                inputs = [query.inputs for query in self.batch] or [*blanks]
                outputs = list(engine.run(self.row.subnet, size, inputs))
            else:
                asked_s, launched = clock(), self.launched
                if launched.in_time is not None and not launched.in_time():
                    suspicion.raised()
                launched.wait()
                self.ready_s = clock()
                self.waited_s = self.ready_s - asked_s
                outputs = list(launched.outputs())
                if launched.device_s is not None:
                    self.device_s = launched.device_s()
            if len(outputs) != (expected := self.count or len(blanks)):
                raise errors.InferenceError(f"{len(outputs)} outputs for {expected} inputs; an engine returns one for each")
            return outputs
        except BaseException as error:
            self.failure = Failure.of(error)
            return []
        finally:
            suspicion.clear()

    def took_s(self, finish_s: float) -> float:
        """How long the batch took on the device, as far as the host knows."""
        return finish_s - self.started_s if self.device_s is None else self.device_s


def refill(waiting: Queue, profile: Profile, row: Row, batch: list[Query], outbox: Outbox) -> list[Query]:
    """Replaces the cancelled queries of a batch with the next queries of the queue, and returns the batch.

    The new queries fit into the batch's length bucket.
    """
    if not any(map(futures.resolved, batch)):
        return batch
    outbox.drop(batch)
    live = [query for query in batch if not query.done()]
    longest = profile.at_length(max(query.length for query in batch)).lengths[-1] if len(profile.lengths) > 1 else 0
    while len(live) < len(batch) and len(waiting) and waiting.head_length <= longest:
        more = waiting.pop(len(batch) - len(live), row.accuracy)
        if not more:
            break
        outbox.drop(more)
        live += [query for query in more if not query.done()]
    return live


def may_overlap(engine: Engine, wanted: bool | None) -> bool:
    """Whether a worker prepares its next batch while the device computes. `wanted` is the server's option `overlap`."""
    gains = getattr(engine, "overlap", None)  # None: the engine cannot overlap
    return gains is not None and (gains if wanted is None else wanted)


class OverlapPace:
    """Estimates when the device is done, so that it gets the next batch just before it has finished the last one.

    Too early is bad: queries that arrive later cannot join the batch. Too late is worse: the device idles, and the answers of
    the last batch wait until the worker wakes up. So only measured latencies count, since a profile may be far too long.

    Attributes:
      device_s: for each profiled latency, the estimated latency of batches that have it.
      host_s: how long the host takes to decide about a batch and hand it over.
    """

    __slots__ = ("device_s", "host_s")

    def __init__(self):
        self.device_s: dict[float, float] = {}
        self.host_s = 0.0

    def wake_s(self, started_s: float, profiled_s: float, engine: Engine | None = None) -> float:
        """When to take the next batch, given when the device began with the last one. At once if none like it was measured."""
        lead_s = getattr(engine, "lead_s", 0.0)  # only a `Remote` engine has one
        return started_s + _NEARLY * self.device_s.get(profiled_s, 0.0) - self.host_s - lead_s

    def done_s(self, started_s: float, profiled_s: float) -> float:
        """When the device will be done with a batch. If none like it was measured, this follows the profile."""
        return started_s + self.device_s.get(profiled_s, profiled_s)

    def observe_device(self, profiled_s: float, took_s: float | None) -> None:
        """Updates `device_s` with the measured latency of a batch; None if the worker woke up too late.

        The estimate falls quickly when the device gets faster, since answers would be late, and rises slowly.
        """
        before_s = self.device_s.get(profiled_s)
        if before_s is None:
            estimate_s = profiled_s if took_s is None else min(took_s, profiled_s)
        elif took_s is None:
            estimate_s = before_s * _CUT
        else:
            more_s = took_s - before_s
            estimate_s = before_s + (more_s / 2 if more_s < 0 else _WEIGHT**2 * min(more_s, before_s))
        self.device_s[profiled_s] = max(estimate_s, _LEAST_S)

    def observe_host(self, took_s: float) -> None:
        """Updates `host_s` with the time that the host took. One outlier has little effect."""
        self.host_s += _WEIGHT * (min(took_s, 2 * self.host_s + _LEAST_HOST_S) - self.host_s)
