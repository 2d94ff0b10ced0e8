"""How many queries, and bytes of inputs, may wait. No jax."""

import math
from collections.abc import Sequence

from superserve_jax import errors
from superserve_jax.scheduling.length_queue import LengthQueue
from superserve_jax.scheduling.queue import Queue
from superserve_jax.serving.futures import Query


class QueueLimits:
    """How many queries, and bytes of inputs, may wait. Cancelled ones take no room.

    Args:
      lengths: length buckets; `()` where inputs have one shape, and counting them is counting bytes.
      max_queue, max_queue_bytes: see `server.Server`.
      input_bytes: of one input, at the longest length.
    """

    def __init__(self, lengths: Sequence[int], *, max_queue: int, max_queue_bytes: int, input_bytes: int):
        self._max_queue, self._limit = max_queue, f"max_queue={max_queue}"
        self._max_tokens, self._token_limit = math.inf, f"max_queue_bytes={max_queue_bytes}"
        if max_queue * input_bytes <= max_queue_bytes:
            pass  # so many have fewer bytes, whatever they are
        elif lengths:
            self._max_tokens = max_queue_bytes * lengths[-1] // input_bytes
        else:
            self._max_queue, self._limit = max_queue_bytes // input_bytes, f"{self._token_limit} ({input_bytes} each)"
        self._until_sweep = 0  # refusals

    def check(self, waiting: Queue, count: int, lengths: Sequence[int]) -> None:
        """Raises QueueFullError where the queue has no room for so many more, of these lengths if inputs have any.

        Cancelled queries are swept out where there is none. That takes 0.1 us for each that waits, so it is not done again
        before as many have been refused as it has left: of the cost of a refusal it is a constant part.
        """
        if (limit := self._exceeded(waiting, count, lengths)) is None:
            return
        self._until_sweep -= count
        if self._until_sweep <= 0:
            waiting.sweep(Query.done)
            self._until_sweep = len(waiting)
            if (limit := self._exceeded(waiting, count, lengths)) is None:
                return
        raise errors.QueueFullError(
            f"{len(waiting)} queries wait and {count} more would exceed {limit}; "
            f"submit more slowly, add devices, or raise {limit.partition('=')[0]}"
        )

    def _exceeded(self, waiting: Queue, count: int, lengths: Sequence[int]) -> str | None:
        """The bound that so many more would exceed."""
        if len(waiting) + count > self._max_queue:
            return self._limit
        if isinstance(waiting, LengthQueue) and self._max_tokens < math.inf and waiting.tokens(lengths) > self._max_tokens:
            return self._token_limit
        return None
