"""When a worker prepares its next batch, while the device still computes the last one. No jax."""

_NEARLY = 0.9  # the next batch is taken after this share of the expected latency
_WEIGHT = 0.2  # weight of the last batch in `host_s`; squared, its weight in `ratio` if the device got slower
_AT_ONCE_S = 2e-5  # a shorter wait for the device means that the worker woke up too late
_CUT = 0.8  # `ratio` shrinks by this factor when the worker woke up too late
_LEAST_RATIO = 1e-2  # `ratio` grows in proportion to itself, so it must not reach 0
_LEAST_HOST_S = 1e-4  # one outlier counts as at most 2 * host_s + this time


class OverlapPace:
    """Estimates how long batches take, so that the device gets the next batch just before it has finished the last one.

    Too early is bad: queries that arrive later cannot join the batch. Too late is worse: the device idles, and the answers of
    the last batch wait until the worker wakes up.

    Attributes:
      ratio: latency of a batch / its profiled latency.
      host_s: how long the host takes to decide about a batch and hand it over.
    """

    __slots__ = ("host_s", "ratio")

    def __init__(self):
        self.ratio, self.host_s = 1.0, 0.0

    def wake_s(self, started_s: float, profiled_s: float) -> float:
        """When to take the next batch, given when the device began with the last one."""
        return started_s + _NEARLY * profiled_s * self.ratio - self.host_s

    def observe_device(self, ratio: float | None) -> None:
        """Updates `ratio` with the measured ratio of a batch; None if the worker woke up too late (see `overslept`).

        The estimate falls quickly when the device gets faster, since answers would be late, and rises slowly.
        """
        if ratio is None:
            self.ratio *= _CUT
        else:
            more = ratio - self.ratio
            self.ratio += more / 2 if more < 0 else _WEIGHT**2 * min(more, self.ratio)
        self.ratio = max(self.ratio, _LEAST_RATIO)

    def observe_host(self, took_s: float) -> None:
        """Updates `host_s` with the time that the host took. One outlier has little effect."""
        self.host_s += _WEIGHT * (min(took_s, 2 * self.host_s + _LEAST_HOST_S) - self.host_s)


def overslept(waited_s: float) -> bool:
    """Whether a worker that waited only `waited_s` for its device, after a sleep, woke up too late."""
    return waited_s < _AT_ONCE_S
