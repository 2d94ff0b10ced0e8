"""What has arrived lately: mean and variance of the arrivals, and the shortest SLO. No jax."""

import math


class ArrivalMeter:
    """What has come lately: mean and variance of the arrivals per second of time, and the shortest SLO.

    The first two are from the numbers in windows of about 20 ms, averages that forget with a time constant of one second: long
    enough to know the variance to a tenth, short enough to follow traffic that accelerates. A window is short enough to fall
    within a burst, and as long as some SLOs, so that arrivals that come in clusters are not taken for independent ones.

    >>> meter = ArrivalMeter()
    >>> [meter.read(t, n) for t, n in ((0.0, 0), (0.01, 7), (0.02, 20), (0.04, 40))]
    [(0.0, 0.0), (0.0, 0.0), (1000.0, 1000.0), (1000.0, 980.1986733067553)]
    >>> meter.shorten(0.05, 36.0), meter.shorten(0.05, 18.0), meter.shorten(0.5, 36.0), meter.slo_ms
    (None, None, None, 18.0)
    """

    __slots__ = ("_arrived", "_reading", "_shortest_ms", "_since_s", "_turn_s", "memory_s", "slo_ms", "window_s")

    def __init__(self, *, window_s: float = 0.02, memory_s: float = 1.0):
        self.window_s, self.memory_s = window_s, memory_s
        self._since_s, self._arrived = math.nan, 0
        self._reading = (0.0, 0.0)
        self.slo_ms = math.inf  # the shortest SLO since the turn before the last
        self._shortest_ms, self._turn_s = math.inf, -math.inf  # and since the last

    def shorten(self, now_s: float, slo_ms: float) -> None:
        """A query has come that allows `slo_ms`."""
        if now_s > self._turn_s + self.memory_s:
            self.slo_ms, self._shortest_ms, self._turn_s = min(self._shortest_ms, slo_ms), slo_ms, now_s
        elif slo_ms < self._shortest_ms:
            self._shortest_ms = slo_ms
            self.slo_ms = min(self.slo_ms, slo_ms)

    def rescale(self, factor: float) -> None:
        """What `read` is told from now on is in units of which one of before is `factor`."""
        rate, variance = self._reading
        self._arrived, self._reading = self._arrived * factor, (rate * factor, variance * factor**2)

    def read(self, now_s: float, arrived: float, unit: float = 1.0) -> tuple[float, float]:
        """The mean and the variance, given that `arrived` queries have come since the beginning. O(1).

        Args:
          unit: the variance over the mean of independent arrivals, with which the first reading makes do; 1 for a number of
            queries.
        """
        elapsed_s = now_s - self._since_s
        if elapsed_s < self.window_s:
            return self._reading
        if elapsed_s >= self.window_s:  # not so at the first call
            rate, variance = self._reading
            now_qps = (arrived - self._arrived) / elapsed_s
            if not rate:
                self._reading = now_qps, now_qps * unit
            else:
                # Where nobody has asked for several windows, as though the arrivals had been spread evenly over them.
                windows = int(elapsed_s / self.window_s)
                kept = math.exp(-elapsed_s / self.memory_s)
                kept_by_others = math.exp(-elapsed_s * (windows - 1) / windows / self.memory_s)
                surprise = (now_qps - rate) ** 2 * elapsed_s / windows
                self._reading = rate * kept + now_qps * (1 - kept), variance * kept + surprise * kept_by_others * (1 - kept)
        self._since_s, self._arrived = now_s, arrived
        return self._reading
