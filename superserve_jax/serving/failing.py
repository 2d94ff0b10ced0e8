"""What a worker does when a batch has failed. No jax.

`Failing` is the part of `workers.Pool` for that; what becomes of the queries, and why, stands in `retries.py`. The worker
runs the batch once more with blank inputs: only where that fails, too, the device is to blame. Methods named `_locked_...`
expect the caller to hold the lock.
"""

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Policy
from superserve_jax.serving import retries
from superserve_jax.serving.futures import Query
from superserve_jax.serving.options import Options
from superserve_jax.serving.roster import Flight, Worker
from superserve_jax.serving.swap import Swapping

_log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0


class Failing(Swapping):
    """A crew whose batches may fail.

    Args:
      pause_s: how long a worker rests after a failure.
    """

    def __init__(
        self,
        profiles: Sequence[Profile],
        make_policy: Callable[[Profile], Policy],
        settings: Options,
        *,
        pause_s: float,
    ):
        super().__init__(profiles, make_policy, settings)
        self._batch_sizes = profiles[0].batch_sizes  # as those of all
        self._padded = [profiles[0].batch_index(n) for n in range(profiles[0].max_batch + 1)]
        self._max_failures, self._pause_s = settings.max_failures, min(pause_s, _LONGEST_PAUSE_S)

    def _failed(self, worker: Worker, flight: Flight, error: BaseException) -> bool:
        """Gives the batch of a failed run back. False when the worker is to leave."""
        fresh = flight.retry is None
        _log.warning(
            "%s failed on a batch of %d: %r", worker.name, len(flight.batch), error, exc_info=error if fresh else None
        )
        # The frames hold the engine, and so its device's memory, for as long as a client or `last_error` holds the error.
        retries.forget_frames(error)
        flight.launched = None
        size, hopeless = self._batch_sizes[flight.place], []
        too_large = retries.out_of_memory(error) and (size > self._batch_sizes[0] or flight.shared)
        with self._lock:
            self._failures += 1
            worker.failed += 1
            worker.last_error = self._last_error = error
            if flight in worker.flights:  # else it has been abandoned with it, and who did that gave it back
                worker.flights.remove(flight)
                now_s = self._clock()
                worker.next_begins(now_s, now_s)
                if too_large and flight.shared:
                    worker.overlap = False  # for two there is not enough memory, but maybe for one
                    self._locked_give_back(worker, flight)
                elif too_large:
                    hopeless = self._locked_shrink(worker, flight, size)
                else:
                    hopeless = self._locked_failed(worker, flight, error)
            self._work.notify_all()  # what has been given back is not for every worker
        for query, gave_up in hopeless:
            query.set_exception(gave_up)
        if too_large or not worker.alive or self._works(worker, flight):
            return worker.alive or bool(worker.flights)
        worker.failures += 1
        if worker.failures >= self._max_failures:
            return False
        if self._alive > 1 and not worker.flights:
            # Else a broken device, which is always free, would be the first to take whatever comes.
            self._closing.wait(self._pause_s * worker.failures)
        return True

    def _locked_shrink(self, worker: Worker, flight: Flight, size: int) -> list[tuple[Query, errors.SuperServeError]]:
        """From now on this worker runs no batches of `size`, for which its device has not enough memory. Its batch goes back,
        but for the queries that are returned, and why."""
        worker.profile = retries.at_most(worker.profile, size // 2)
        worker.policy = self._make_policy(worker.profile)
        worker.overlap = self._overlaps(worker.engine)  # it failed alone, so the other one was not to blame before
        if worker.alive and worker.successor is None:
            self._fleet.resize(worker.index, worker.profile)
        self._locked_give_back(worker, flight)
        return self._locked_refuse()

    def _works(self, worker: Worker, failed: Flight) -> bool:
        """Whether the worker can do with blank inputs what it failed at: then the inputs were to blame, and not the device."""
        blanks = [np.zeros_like(query.inputs) for query in failed.batch]
        flight = Flight(failed.row, (), failed.place, None, "", self._clock())  # as any batch, it may hang
        with self._lock:
            if not worker.alive:
                return True
            worker.flights.insert(0, flight)
            worker.watched_s = flight.started_s
        try:
            worker.engine.run(failed.row.subnet, self._batch_sizes[failed.place], blanks)
        except BaseException as error:
            _log.warning("%s fails on blank inputs, too: %r", worker.name, error)
            return False
        finally:
            with self._lock:
                if flight in worker.flights:
                    worker.flights.remove(flight)
                worker.next_begins(-math.inf, self._clock())  # as it has long before the blanks
        worker.failures = 0
        return True
