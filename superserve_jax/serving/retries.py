"""What becomes of the queries of a batch that failed. No jax.

A single poisoned input fails every batch that it is in. So the queries of a failed batch no longer mix with others. They are
run again by themselves, by another worker if there is one: whole at first, for it may have been the worker that failed. Where
that fails, too, or there is no other, they are run in two halves, and what fails is halved again, until the poisoned input has
failed alone. The rest of its batch has been answered by then; for a batch of n it took 2 log2(n) + 1 more. A query that was
alone in the first place is tried `max_tries` times.

Alone on one worker is not enough where there are others, for that worker may be the broken one: a query is given up once it
has failed alone on two. Where a batch hangs, nothing is halved, and its queries are given up with the batch that hangs as the
`max_tries`-th: every one costs a worker.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.queue import Queue
from superserve_jax.serving.futures import Query


@dataclasses.dataclass(eq=False, slots=True)
class Retry:
    """Queries that have failed together, and wait for a batch of their own.

    Args:
      waiting: they, in a queue of the kind that the server has, so that the policy can be asked about them.
      meter: of arrivals that there are none of.
      failures: batches that have failed with all of them.
      avoid: index of the worker on which the last did.
      alone_on: of a single query, the indices of the workers on which it failed alone.
    """

    waiting: Queue
    meter: ArrivalMeter
    failures: int
    avoid: int
    alone_on: frozenset[int] = frozenset()


class Retries:
    """The `Retry`s of one server, in the order in which they are to be run. Not thread-safe: the caller holds a lock."""

    def __init__(self, profile: Profile, *, max_tries: int):
        self.groups: list[Retry] = []
        self._profile, self._max_tries = profile, max_tries

    def waiting(self) -> int:
        """Number of queries."""
        return sum(len(group.waiting) for group in self.groups)

    def items(self) -> list[Query]:
        """Every query, left in place."""
        return [query for group in self.groups for query in group.waiting.items()]

    def find(self, worker: int, *, workers: int) -> Retry | None:
        """The first that a worker may run: none that it failed on itself, unless it is the only one of `workers`."""
        for group in self.groups:
            if group.avoid != worker or workers == 1:
                return group
        return None

    def taken(self, group: Retry) -> None:
        """A batch has been taken from `group`, which goes with its last query."""
        if not len(group.waiting):
            self.groups.remove(group)

    def drain(self) -> list[Query]:
        """Takes every query."""
        taken = [query for group in self.groups for query in group.waiting.drain()]
        self.groups.clear()
        return taken

    def pop_above(self, accuracy: float) -> list[Query]:
        """Takes every query whose floor exceeds `accuracy`."""
        taken = [query for group in self.groups for query in group.waiting.pop_above(accuracy)]
        self.groups = [group for group in self.groups if len(group.waiting)]
        return taken

    def retime(self, profile: Profile) -> None:
        """Counts work by another profile from now on."""
        self._profile = profile
        for group in self.groups:
            group.waiting.retime(profile)
            group.meter = ArrivalMeter()  # there was nothing in it

    def give_back(self, batch: Sequence[Query], before: Retry | None, worker: int) -> None:
        """Puts a batch back that shall not count as tried; `before` is where it came from."""
        if live := [query for query in batch if not query.done()]:
            failures, alone_on = (before.failures, before.alone_on) if before else (0, frozenset())
            self._add(live, failures, worker, alone_on)

    def failed(
        self, batch: Sequence[Query], before: Retry | None, worker: int, *, now_s: float, workers: int, hung: bool = False
    ) -> list[tuple[Query, str]]:
        """Takes the queries of a batch that failed, and returns those that are given up, each with the reason.

        Args:
          before: where the batch came from; None for the queue.
          worker: index of the one it failed on.
          workers: how many there are.
          hung: whether it never came back.
        """
        failures, alone_on = 1 + (before.failures if before else 0), frozenset()
        if len(batch) == 1:
            alone_on = (before.alone_on if before else frozenset()) | {worker}
        given_up = failures >= self._max_tries and (hung or len(alone_on) >= min(2, max(workers, 1)))
        live, hopeless = [], []
        for query in batch:
            if query.done():
                continue
            if given_up:
                hopeless.append((query, f"{failures} batches with it have failed" + ", the last of it alone" * bool(alone_on)))
            elif query.deadline_s <= now_s:
                hopeless.append((query, "no slack was left to try again"))
            else:
                live.append(query)
        whole = hung or (before is None and workers > 1)
        middle = len(live) if whole else -(-len(live) // 2)
        for part in (live[:middle], live[middle:]):
            if part:
                self._add(part, failures, worker, alone_on)
        return hopeless

    def _add(self, queries: Sequence[Query], failures: int, worker: int, alone_on: frozenset[int]) -> None:
        waiting = length_queue.make_queue(self._profile)
        for query in queries:
            waiting.push(query.deadline_s, query, query.floor, query.length)
        self.groups.append(Retry(waiting, ArrivalMeter(), failures, worker, alone_on))


def out_of_memory(error: BaseException) -> bool:
    """Whether an engine failed since the batch was too large for its device.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."))
    (True, True)
    >>> out_of_memory(RuntimeError("INTERNAL: the device burns"))
    False
    """
    # jax.errors.JaxRuntimeError is a RuntimeError, and gives the status code first.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def forget_frames(error: BaseException | None) -> None:
    """Drops the tracebacks of an error and of those that it came from: the frames in them hold what was at work."""
    seen: set[int] = set()  # an error may be its own cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def at_most(profile: Profile, size: int) -> Profile:
    """The profile without the batch sizes above `size`, the smallest kept in any case.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> at_most(paper_profile(), 5).batch_sizes
    (1, 2, 4)
    """
    return profile.at([b for b in profile.batch_sizes if b <= size] or profile.batch_sizes[:1])


def inference_error(query: Query, where: str, why: str, cause: BaseException | None) -> errors.SuperServeError:
    """What a query that is given up is answered with."""
    x = np.asarray(query.inputs)
    held = f", values from {x.min():g} to {x.max():g}" if x.size and x.dtype.kind in "iuf" else ""
    failed = f"{where} failed on the input of shape {x.shape}, dtype {x.dtype}{held}"
    return caused(errors.InferenceError(f"{failed}: {why}. Cause: {cause!r}; see the server's log"), cause)


def caused(error: errors.SuperServeError, cause: BaseException | None) -> errors.SuperServeError:
    """`error`, as though raised from `cause`."""
    error.__cause__ = cause
    return error
