"""The simulated server as data: its workers, its options, and its planned failures. No jax."""

import dataclasses
import math
from typing import NamedTuple

from superserve_jax import errors


class Outage(NamedTuple):
    """A worker is gone from `from_s` to `until_s`. Its running batches go back to the queue.

    A host with several workers is lost by one outage for each of them. A worker in another process may be silent before the
    server knows that it is gone: for `noticed_s` seconds it still gets batches, at most two, and answers none.

    As in the server, a query is not tried again after its deadline, unless its worker's process was lost. So if `noticed_s` is
    above 0, it is answered late, or given up with `expire`.
    """

    worker: int
    from_s: float
    until_s: float = math.inf
    noticed_s: float = 0.0


class Stall(NamedTuple):
    """The whole server is stopped. Nothing is dispatched, and batches that end meanwhile are answered at `until_s`."""

    from_s: float
    until_s: float


class Slowdown(NamedTuple):
    """Batches that start between `from_s` and `until_s` take `factor` times as long. `worker` None means all workers."""

    factor: float
    from_s: float
    until_s: float = math.inf
    worker: int | None = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The simulated server: its workers, its options, and its planned failures.

    Args:
      workers: number of workers.
      overhead_ms: time added to the latency of every batch. The policy does not see it.
      round_trip_ms: how long a call to a worker's process takes besides computing, half of it on the way there.
      lead_ms: how long before its answer a worker gets the next batch, at most `round_trip_ms`. With 0, its device waits for a
        whole round trip between two batches, and the server takes the round trip for latency. With `round_trip_ms` the device
        does not wait. The server knows how long the device took, as with a `Remote` engine (see `engines.base`).
      noise: standard deviation of the logarithm of the latencies.
      actuation_ms: time added to a batch whose subnet differs from the worker's last one, as in a server that loads models.
      max_queue: number of waiting queries from which on new queries are refused.
      expire: whether to give up a query that would be late even alone on the fastest subnet. If False, it is served late.
      admission: whether to refuse a query on arrival if its deadline cannot be met (see `scheduling.admission`).
      outages: the workers that leave, when they leave, and when they return.
      stalls: the times at which the whole server is stopped.
      slowdowns: the times at which workers are slower than their profile.
      follow_drift: whether to correct the policy's state for workers that run slower than their profile (see
        `scheduling.speeds`).
    """

    workers: int = 8
    overhead_ms: float = 0.0
    round_trip_ms: float = 0.0
    lead_ms: float = 0.0
    noise: float = 0.0
    actuation_ms: float = 0.0
    max_queue: float = math.inf
    expire: bool = False
    admission: bool = False
    outages: tuple[Outage, ...] = ()
    stalls: tuple[Stall, ...] = ()
    slowdowns: tuple[Slowdown, ...] = ()
    follow_drift: bool = True

    def __post_init__(self):
        if self.workers < 1:
            raise errors.ConfigError(f"workers must be 1 or more, got {self.workers}")
        for name in ("overhead_ms", "round_trip_ms", "lead_ms", "noise", "actuation_ms", "max_queue"):
            if not getattr(self, name) >= 0:
                raise errors.ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.lead_ms <= self.round_trip_ms < math.inf:
            raise errors.ConfigError(
                f"lead_ms={self.lead_ms:g} must be at most round_trip_ms={self.round_trip_ms:g}, which must be finite"
            )
        workers = range(self.workers)
        wrong = [
            *(event for event in (*self.outages, *self.stalls, *self.slowdowns) if not 0 <= event.from_s < event.until_s),
            *(outage for outage in self.outages if outage.worker not in workers),
            *(outage for outage in self.outages if not 0 <= outage.noticed_s < outage.until_s - outage.from_s),
            *(stall for stall in self.stalls if stall.until_s == math.inf),
            *(slow for slow in self.slowdowns if slow.worker not in (None, *workers) or not 0 < slow.factor < math.inf),
        ]
        if wrong:
            raise errors.ConfigError(
                f"{wrong[0]} is impossible: it must begin before it ends, on a worker from 0 to {self.workers - 1}; an outage "
                "must be noticed before it ends, a stall must end, and a slowdown needs a positive and finite factor"
            )
