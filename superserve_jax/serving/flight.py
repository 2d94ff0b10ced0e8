"""A batch on its way through a worker. No jax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.engines.base import Engine, Launched
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.queue import Queue
from superserve_jax.serving import futures
from superserve_jax.serving.failure import Failure
from superserve_jax.serving.futures import Query
from superserve_jax.serving.outbox import Outbox
from superserve_jax.serving.retries import Retry


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
    shared: bool = False

    def __post_init__(self):
        self.count = len(self.batch)

    # Only these two methods call an engine, and they catch whatever it raises.

    def launch(self, engine: Engine, size: int, inputs: list[Any]) -> None:
        """Hands the batch to the device (see `Overlapping.launch`). An error is kept for `compute`."""
        try:
            self.launched = engine.launch(self.row.subnet, size, inputs)  # type: ignore[attr-defined]
        except BaseException as error:
            self.failure = Failure.of(error)

    def compute(self, engine: Engine, size: int, inputs: list[Any], clock: Callable[[], float]) -> list[Any]:
        """Runs the batch, or waits for it if it was launched. Returns the outputs, one for each query.

        If the engine raises, the error is kept in `failure` and the result is an empty list.
        """
        if self.failure is not None:
            return []
        try:
            if self.launched is None:
                outputs = list(engine.run(self.row.subnet, size, inputs))
            else:
                asked_s = clock()
                self.launched.wait()
                self.ready_s = clock()
                self.waited_s = self.ready_s - asked_s
                outputs = list(self.launched.outputs())
            if self.count and len(outputs) != self.count:
                raise errors.InferenceError(f"{len(outputs)} outputs for {self.count} inputs; an engine returns one for each")
            return outputs
        except BaseException as error:
            self.failure = Failure.of(error)
            return []


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
