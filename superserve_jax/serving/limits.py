"""Memory limits: how many queries may wait, and smaller batches for a worker that ran out of memory. No jax."""

import math
from collections.abc import Callable, Sequence

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.length_queue import LengthQueue
from superserve_jax.scheduling.queue import Queue
from superserve_jax.serving.futures import Query


class QueueLimits:
    """Limits of the queue. Cancelled queries take no room.

    Args:
      lengths: the length buckets; `()` if all inputs have one shape. Then the limit in bytes becomes a number of queries.
      max_queue, max_queue_bytes: see `options.ServerOptions`.
      input_bytes: size of one input of the longest length.
    """

    def __init__(self, lengths: Sequence[int], *, max_queue: int, max_queue_bytes: int, input_bytes: int):
        self._max_queue, self._limit = max_queue, f"max_queue={max_queue}"
        self._max_tokens, self._token_limit = math.inf, f"max_queue_bytes={max_queue_bytes}"
        if max_queue * input_bytes <= max_queue_bytes:
            pass  # even a full queue has fewer bytes
        elif lengths:
            self._max_tokens = max_queue_bytes * lengths[-1] // input_bytes
        else:
            self._max_queue, self._limit = max_queue_bytes // input_bytes, f"{self._token_limit} ({input_bytes} each)"
        self._until_sweep = 0  # refusals

    def check(self, waiting: Queue, count: int, lengths: Sequence[int], discard: Callable[[Query], bool]) -> None:
        """Raises QueueFullError if the queue has no room for `count` more queries.

        A full queue is first searched for cancelled queries, which takes 0.1 us per waiting query. If n queries are left, the
        next search comes after n more refusals. So a refusal takes constant time on average.

        Args:
          waiting: the queue.
          count: number of new queries.
          lengths: lengths of the new queries, if inputs have a length.
          discard: returns whether a query can be removed.
        """
        if (limit := self._exceeded(waiting, count, lengths)) is None:
            return
        self._until_sweep -= count
        if self._until_sweep <= 0:
            waiting.sweep(discard)
            self._until_sweep = len(waiting)
            if (limit := self._exceeded(waiting, count, lengths)) is None:
                return
        raise errors.QueueFullError(
            f"{len(waiting)} queries wait and {count} more would exceed {limit}; "
            f"submit more slowly, add devices, or raise {limit.partition('=')[0]}"
        )

    def _exceeded(self, waiting: Queue, count: int, lengths: Sequence[int]) -> str | None:
        """The limit that the new queries would exceed; None if there is room."""
        if len(waiting) + count > self._max_queue:
            return self._limit
        if self._max_tokens < math.inf and isinstance(waiting, LengthQueue) and waiting.tokens(lengths) > self._max_tokens:
            return self._token_limit
        return None


def at_most(profile: Profile, size: int) -> Profile:
    """The profile without the batch sizes above `size`. The smallest batch size stays in any case.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> at_most(paper_profile(), 5).batch_sizes
    (1, 2, 4)
    """
    return profile.at([b for b in profile.batch_sizes if b <= size] or profile.batch_sizes[:1])
