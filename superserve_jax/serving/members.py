"""The workers of a pool: names, who is alive, what they offer together, and how they failed. No jax."""

import itertools
from collections.abc import Mapping
from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.serving.flight import Failure
from superserve_jax.serving.swaps import Successor
from superserve_jax.serving.threads import Outbox
from superserve_jax.serving.worker import Gone, Worker

_MAX_GONE = 16  # how many gone workers stay in `health` when a worker joins


class Members:
    """The workers of a pool, present and gone. The caller holds the pool's lock.

    A worker is *alive* while it takes batches, and *present* until its thread has ended or was abandoned. A removed worker is
    present, but not alive, until it has answered its last batch.

    Args:
      outbox: takes errors that are not needed any more.
      correct: whether to follow slowdowns of workers (see `Fleet`).

    Attributes:
      workers: the present workers, and about 16 that have gone. Each join forgets the others: first removed workers, then the
        oldest.
      joined, alive, abandoned: how many workers have joined so far, are alive, and were abandoned.
      failures: how many batches have failed.
      fleet: the workers' speeds.
    """

    def __init__(self, outbox: Outbox, *, correct: bool):
        self.workers: tuple[Worker, ...] = ()
        self.joined = self.alive = self.abandoned = self.failures = 0
        self.fleet = Fleet(correct=correct)
        self._last_failure: Failure | None = None
        self._outbox, self._correct = outbox, correct

    def any_present(self) -> bool:
        """Whether a thread is left that may take or answer a batch."""
        return any(worker.present for worker in self.workers)

    def free_place(self, wanted: str) -> tuple[str, int]:
        """A name and an index that no present worker has. The name is the wanted one, with a number if need be."""
        present = [worker for worker in self.workers if worker.present]
        names = itertools.chain([wanted], (f"{wanted} ({n})" for n in itertools.count(2)))
        return (
            next(name for name in names if name not in {worker.name for worker in present}),
            next(i for i in itertools.count() if i not in {worker.index for worker in present}),
        )

    def join(self, worker: Worker) -> None:
        """Adds a worker. Forgets gone workers: one of the same name, and those beyond `_MAX_GONE`."""
        self.fleet.join(worker.index, worker.profile)
        others = [other for other in self.workers if other.name != worker.name]
        gone = [other for other in others if not other.present]
        forgotten = sorted(gone, key=lambda other: other.gone != "removed")[:-_MAX_GONE]
        self.workers = (*(other for other in others if other not in forgotten), worker)
        worker.alive = worker.present = True
        self.joined += 1
        self.alive += 1

    def is_alive(self, name: str) -> bool:
        """Whether a live worker has that name."""
        return any(worker.alive and worker.name == name for worker in self.workers)

    def give_up(self, name: str) -> None:
        """Notes that the lost workers of that name do not come back."""
        for worker in self.workers:
            if worker.name == name and worker.gone == "lost":
                worker.gone = "removed"

    def removable(self, name: str) -> Worker:
        """The live worker with that name. Raises UnknownNameError if there is none, and ConfigError if it is the last one."""
        found = {worker.name: worker for worker in self.workers if worker.alive}
        errors.check_name("worker", name, found)
        if len(found) == 1:
            raise errors.ConfigError(f"{name} is the last worker; add another one before you remove it, or close the server")
        return found[name]

    def retire(self, worker: Worker, gone: Gone) -> None:
        """Makes a worker take no more batches."""
        self.alive -= worker.alive
        self.abandoned += gone == "abandoned"
        self.fleet.leave(worker.index)
        worker.locked_retire(gone)

    def succeed(self, successors: Mapping[Worker, Successor], first: Profile) -> None:
        """Gives the workers their successors, and resets the speeds.

        Args:
          successors: the successor of each live worker.
          first: the first of the new profiles. It sets the unit of the speeds.
        """
        fleet = Fleet(correct=self._correct)
        for worker in sorted(self.workers, key=lambda w: w.present):  # absent ones first: their index may be in use again
            successor = successors.get(worker)
            worker.locked_succeed(successor)
            fleet.join(worker.index, successor.profile if successor else first)
            if not successor:
                fleet.leave(worker.index)
        self.fleet = fleet  # only when it is complete: workers report to it without the lock

    def note(self, failure: Failure) -> None:
        """Remembers a failure of an engine or the policy as the last one."""
        self._outbox.drop(self._last_failure)
        self._last_failure = failure

    def lost_error(self) -> errors.SuperServeError:
        """The error that queries get when no worker is left."""
        failure = self._last_failure
        error = errors.WorkersLostError(
            f"the last of {self.joined} workers has left; its last error was {failure and failure.text}. "
            "Fix the cause of that error, and add a worker or open a new server"
        )
        return error if failure is None else failure.cause(error)

    def offer(self) -> tuple[float, float] | None:
        """The accuracy that every live worker reaches, and the lowest latency in seconds; None if no worker is alive.

        For a worker with a successor, the successor counts.
        """
        profiles = [(worker.successor or worker).profile for worker in self.workers if worker.alive]
        if not profiles:
            return None
        accuracy = min(profile.rows[-1].accuracy for profile in profiles)
        return accuracy, min(1e-3 * profile.at_length(0).fastest().latency_ms[0] for profile in profiles)

    def health(self, now_s: float) -> dict[str, Any]:
        """The part of `Server.health` about workers."""
        return {
            "workers": len(self.workers),
            "joined": self.joined,
            "alive": self.alive,
            "abandoned": self.abandoned,
            "failures": self.failures,
            "last_error": None if self._last_failure is None else self._last_failure.text,
            "running": sum(flight.count for worker in self.workers if worker.present for flight in worker.underway.flights),
            "per_worker": [self._health_of(worker, now_s) for worker in self.workers],
        }

    def _health_of(self, worker: Worker, now_s: float) -> dict[str, Any]:
        return {
            "name": worker.name,
            "state": worker.state,
            "batches": worker.batches,
            "failures": worker.failures.count,
            "max_batch": worker.profile.max_batch,
            "out_of_service": worker.blame.health(),
            "slowdown": self.fleet.slowdown(worker.index) if worker.present else 1.0,
            "last_error": None if (last := worker.failures.last) is None else last.text,
            "running_s": worker.underway.ran_s(now_s),
        }
