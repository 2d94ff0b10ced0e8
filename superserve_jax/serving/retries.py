"""Retries: how the queries of a failed batch run again. No jax.

One poisoned input fails every batch that contains it. So the queries of a failed batch no longer mix with others: they form a
group, which runs again by itself.

1. The whole group runs on another worker, if there is one. Perhaps only the first worker was broken.
2. If that fails too, or there is only one worker, the group is split into halves, and these again, until the poisoned input
   fails alone. The others have been answered by then. With one poisoned input among n, it takes about 2 log2(n) + 1 more
   batches.
3. A query that failed alone is given up after `max_tries` failed batches. With several workers it must have failed alone on
   two of them, since one may be broken.

A batch that hangs costs a worker each time. So it is not split, and its queries are given up after `max_tries` batches.
"""

import dataclasses
from collections.abc import Sequence

from superserve_jax.profile import Profile
from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.length_queue import Queue
from superserve_jax.serving.futures import Query


@dataclasses.dataclass(eq=False, slots=True)
class Retry:
    """A group of queries that have failed together and wait for a batch of their own.

    Args:
      waiting: the queries, in a queue like the server's, because a policy decides about queues.
      failures: number of batches that have failed with all of them.
      avoid: index of the worker on which the last batch failed.
      alone_on: indices of the workers on which a single query has failed alone.
    """

    waiting: Queue
    failures: int
    avoid: int
    alone_on: frozenset[int] = frozenset()


class Retries:
    """The groups of failed queries of one server, in the order in which they run. The caller holds the pool's lock.

    Args:
      profile: the profile of the first worker. It measures the work of the groups.
      max_tries: how many batches with a query must fail before the query is given up.

    Attributes:
      groups: the groups. An empty one stays until the next `find`.
    """

    def __init__(self, profile: Profile, *, max_tries: int):
        self.groups: list[Retry] = []
        self.profile, self._max_tries = profile, max_tries

    def find(self, worker: int, *, workers: int) -> Retry | None:
        """The first group that `worker` may run: any that did not just fail on it, or any at all if it is the only worker.

        Args:
          worker: index of the worker.
          workers: how many workers are alive.
        """
        self.groups = [group for group in self.groups if len(group.waiting)]
        return next((group for group in self.groups if group.avoid != worker or workers == 1), None)

    def give_back(self, batch: Sequence[Query], before: Retry, worker: int) -> None:
        """Makes a group of a batch that was taken from the group `before` and does not count as failed.

        Args:
          batch: the queries of the batch.
          before: the group that the batch was taken from.
          worker: index of the worker that should not run it next.
        """
        self._add([query for query in batch if not query.done()], before.failures, worker, before.alone_on)

    def failed(
        self, batch: Sequence[Query], before: Retry | None, worker: int, *, now_s: float, workers: int, hung: bool = False
    ) -> list[tuple[Query, str]]:
        """Makes groups of the queries of a failed batch. Returns the queries that are given up, each with the reason.

        Args:
          batch: the queries of the batch.
          before: the group that the batch was taken from; None for the queue.
          worker: index of the worker on which the batch failed.
          now_s: the time now. Queries with an earlier deadline are given up.
          workers: how many workers are alive.
          hung: whether the batch never came back.
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
            self._add(part, failures, worker, alone_on)
        return hopeless

    def _add(self, queries: Sequence[Query], failures: int, worker: int, alone_on: frozenset[int]) -> None:
        waiting = length_queue.make_queue(self.profile)
        for query in queries:
            waiting.push(query.deadline_s, query, query.floor, query.length)
        self.groups.append(Retry(waiting, failures, worker, alone_on))
