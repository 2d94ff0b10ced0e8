"""Recent arrivals of a live server, from a counter that is read often. No jax."""

import collections
import math

import numpy as np

MOST_SECONDS = 30  # how many seconds of traffic are simulated
_LONGEST_S = 0.25  # a longer time between two readings says too little about the arrivals in it
_COVERED_S = 0.9  # how much of a second the readings must cover


class Recent:
    """The number of arrivals between readings of a counter.

    Args:
      keep_s: how long they are kept.

    >>> recent = Recent(keep_s=60.0)
    >>> for i in range(41):
    ...     recent.read(0.1 * i, 5 * i)
    >>> [len(second) for second in recent.seconds(60.0)]
    [50, 50, 50, 50]
    """

    def __init__(self, keep_s: float):
        self._keep_s = keep_s
        self._last: tuple[float, int] | None = None
        self._counts: collections.deque[tuple[float, float, int]] = collections.deque()  # (from, to, arrivals)

    def read(self, now_s: float, arrived: int) -> None:
        """Records that so many queries have arrived since the beginning."""
        if self._last is not None and now_s > self._last[0]:
            self._counts.append((self._last[0], now_s, arrived - self._last[1]))
        self._last = now_s, arrived
        while self._counts and self._counts[0][0] < now_s - self._keep_s:
            self._counts.popleft()

    def seconds(self, window_s: float, *, seed: int = 0) -> list[np.ndarray]:
        """At most 30 evenly spaced seconds of the last `window_s`, as arrival times from 0 to about 1 in ascending order.

        The times between two readings are random. Seconds without enough readings are left out.
        """
        if self._last is None:
            return []
        since_s = self._last[0] - window_s
        blocks: dict[int, list[tuple[float, float, int]]] = collections.defaultdict(list)
        for count in self._counts:
            if count[0] >= since_s and count[1] - count[0] <= _LONGEST_S:
                blocks[math.floor((count[0] + count[1]) / 2)].append(count)
        whole = [block for block in blocks.values() if sum(to - begin for begin, to, _ in block) >= _COVERED_S]
        step = max(math.ceil(len(whole) / MOST_SECONDS), 1)
        rng = np.random.default_rng(seed)
        return [_arrivals(block, rng) for block in whole[::-step][::-1]]


def _arrivals(block: list[tuple[float, float, int]], rng: np.random.Generator) -> np.ndarray:
    start_s = block[0][0]
    parts = [begin - start_s + (to - begin) * rng.random(count) for begin, to, count in block]
    return np.sort(np.concatenate(parts))
