"""The arrival meter: mean and variance of recent arrivals, and the shortest recent SLO. No jax."""

import math


class ArrivalMeter:
    """Estimates mean and variance of the arrivals per second, and remembers the shortest recent SLO.

    Arrivals are counted in windows of about 20 ms. Mean and variance are exponential averages over these counts with a time
    constant of one second. This is long enough to know the variance to 10 %, and short enough to follow accelerating traffic.
    A window is shorter than a burst. It is as long as a short SLO, so that clustered arrivals do not look independent.

    Args:
      window_s: the shortest length of a window.
      memory_s: the time constant of the averages, and the time for which a short SLO is remembered at least.

    Attributes:
      slo_ms: the shortest SLO of the last one to two `memory_s`; infinite before the first arrival.

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
        # Time is divided into periods of `memory_s`. `slo_ms` is the shortest SLO of this period and the previous one.
        self.slo_ms = math.inf
        self._shortest_ms, self._turn_s = math.inf, -math.inf  # shortest SLO and start of this period

    def shorten(self, now_s: float, slo_ms: float) -> None:
        """Record the arrival of a query with this SLO."""
        if now_s > self._turn_s + self.memory_s:
            self.slo_ms, self._shortest_ms, self._turn_s = min(self._shortest_ms, slo_ms), slo_ms, now_s
        elif slo_ms < self._shortest_ms:
            self._shortest_ms = slo_ms
            self.slo_ms = min(self.slo_ms, slo_ms)

    def rescale(self, factor: float) -> None:
        """Change the unit of `arrived`: one old unit equals `factor` new ones."""
        rate, variance = self._reading
        self._arrived, self._reading = self._arrived * factor, (rate * factor, variance * factor**2)

    def read(self, now_s: float, arrived: float, dispersion: float = 1.0) -> tuple[float, float]:
        """Mean and variance of the arrivals per second; (0.0, 0.0) until the first window has ended. O(1).

        Args:
          now_s: the present time.
          arrived: number of arrivals since the beginning, or the sum of their work.
          dispersion: variance / mean of independent arrivals, assumed for the first window; 1 if `arrived` counts queries.
        """
        elapsed_s = now_s - self._since_s
        if elapsed_s < self.window_s:
            return self._reading
        if elapsed_s >= self.window_s:  # False at the first call, where `elapsed_s` is NaN
            rate, variance = self._reading
            now_qps = (arrived - self._arrived) / elapsed_s
            if not rate:
                self._reading = now_qps, now_qps * dispersion
            else:
                # After several windows without a call, assume that the arrivals were spread evenly over them.
                windows = int(elapsed_s / self.window_s)
                kept = math.exp(-elapsed_s / self.memory_s)
                kept_by_others = math.exp(-elapsed_s * (windows - 1) / windows / self.memory_s)
                surprise = (now_qps - rate) ** 2 * elapsed_s / windows
                self._reading = rate * kept + now_qps * (1 - kept), variance * kept + surprise * kept_by_others * (1 - kept)
        self._since_s, self._arrived = now_s, arrived
        return self._reading
