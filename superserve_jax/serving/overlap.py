"""When a worker prepares its next batch, while the device still computes the last one. No jax."""

_NEARLY = 0.9  # of the expected latency, after which the next batch is taken
_WEIGHT = 0.2  # of the last batch in the estimates
_AT_ONCE_S = 2e-5  # a shorter wait for the device means that the worker woke up too late,
_CUT = 0.8  # and then the estimate of the latency shrinks by this factor
_LEAST_RATIO = 1e-2  # the estimate grows in proportion to itself, so it must not reach 0
_LEAST_HOST_S = 1e-4  # the estimate of the host's time may always grow by this much


class OverlapPace:
    """Estimates how long batches take, so that the device gets the next one just before it is done with the last.

    Too early is bad: queries that arrive later cannot join the batch. Too late is worse: the device idles, and answers are
    late by the time that the worker overslept.

    Attributes:
      ratio: latency of a batch over its profiled latency.
      host_s: how long the host takes to decide about a batch and to hand it over.
    """

    __slots__ = ("host_s", "ratio")

    def __init__(self):
        self.ratio, self.host_s = 1.0, 0.0

    def wake_s(self, started_s: float, profiled_s: float) -> float:
        """When to take the next batch, given when the device began with the last one."""
        return started_s + _NEARLY * profiled_s * self.ratio - self.host_s

    def observe_device(self, ratio: float | None) -> None:
        """Learns from a batch. None says that the device was done before the worker woke up (see `overslept`).

        The estimate follows a faster device quickly, since answers would be late, and a slower one slowly.
        """
        if ratio is None:
            self.ratio *= _CUT
        else:
            more = ratio - self.ratio
            self.ratio += more / 2 if more < 0 else _WEIGHT**2 * min(more, self.ratio)
        self.ratio = max(self.ratio, _LEAST_RATIO)

    def observe_host(self, took_s: float) -> None:
        """Learns from the time that the host took. One outlier counts for little."""
        self.host_s += _WEIGHT * (min(took_s, 2 * self.host_s + _LEAST_HOST_S) - self.host_s)


def overslept(waited_s: float) -> bool:
    """Whether a worker that slept first, and then waited so long for its device, woke up too late."""
    return waited_s < _AT_ONCE_S
