"""How fast each worker is, from its profile and from its recent batches. Server and simulator share it. No jax.

A profile is measured once. A device that is shared or throttled may run slower later. A policy that trusts the profile then
misses deadlines. Let a device be f times slower than its profile. To a policy it looks like a device as fast as the profile,
on which time runs f times faster: slack and SLO are f times shorter, and rates are f times higher. So `dispatch` corrects the
state that the policy sees, and the policies keep their tables.

Workers with different speeds serve different shares of the traffic. A policy sees the total speed of the workers as a multiple
of the speed of the worker that it decides for.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from superserve_jax.profile import Profile

_MEMORY_MS = 100.0  # time constant, in milliseconds of computing; a worker that is busy half of the time takes 0.2 s for it
_SHARE = 0.1  # largest weight of one batch in the estimate
_SURPRISE = 0.3  # limit on the distance of a batch's log ratio from the estimate
_IGNORED = 0.05  # estimates below this count as jitter; policies keep a reserve for jitter
_LOG_LIMIT = math.log(8.0)  # largest estimate; for an even slower device the profile is useless


class SlowdownEstimate:
    """Estimates how many times slower than its profile one worker runs.

    The estimate is the exponential of a running mean of log(latency / profiled latency). Longer batches have more weight. Each
    term is clipped (Huber's clipped mean): a single batch that takes fifty times as long moves the estimate by at most 3 %.
    The estimate follows a device that stays slower within some tens of batches. It is never below 1, since a few fast batches
    are no proof of a fast device. Slowdowns below 5 % count as 1.

    >>> estimate = SlowdownEstimate()
    >>> for _ in range(100):
    ...     estimate.observe(20.0, 30.0)
    >>> round(estimate.slowdown, 2)
    1.5
    >>> for took_ms in [1000.0, *[20.0] * 100]:
    ...     estimate.observe(20.0, took_ms)
    >>> estimate.slowdown
    1.0
    """

    __slots__ = ("_log", "slowdown")

    def __init__(self):
        self._log = 0.0
        self.slowdown = 1.0  # at least 1

    def observe(self, profiled_ms: float, took_ms: float) -> None:
        """Record a batch that took `took_ms` and has the profiled latency `profiled_ms`. O(1). One thread at a time."""
        surprise = (math.log(took_ms / profiled_ms) if took_ms > 0 else -math.inf) - self._log
        if surprise > _SURPRISE:  # comparisons, because min and max take twice as long
            surprise = _SURPRISE
        elif surprise < -_SURPRISE:
            surprise = -_SURPRISE
        log = self._log + surprise * (profiled_ms / _MEMORY_MS if profiled_ms < _SHARE * _MEMORY_MS else _SHARE)
        self._log = log = 0.0 if log < 0 else log if log < _LOG_LIMIT else _LOG_LIMIT
        self.slowdown = math.exp(log) if log > _IGNORED else 1.0


class Pace(NamedTuple):
    """The speeds that matter for a decision of one worker, called the asking worker.

    Args:
      workers: total speed of the live workers / speed of the asking worker.
      slowdown: how many times slower than its profile the asking worker runs, at least 1.
      lead: speed of the fastest live worker / speed of the asking worker, at least 1.
    """

    workers: float = 1.0
    slowdown: float = 1.0
    lead: float = 1.0


EVEN_PACE = Pace()
"""The pace of a single worker that is as fast as its profile."""


class Fleet:
    """The speeds of all workers. The caller holds a lock, except for `observe`.

    Args:
      profiles: the profiles of workers 0, 1, ... `join` adds more workers.
      correct: whether to estimate slowdowns. If False, every worker counts as fast as its profile.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> profile = paper_profile()
    >>> fleet = Fleet([profile, profile, profile.scaled(2.0)])
    >>> fleet.pace(0), fleet.pace(2)
    (Pace(workers=2.5, slowdown=1.0, lead=1.0), Pace(workers=5.0, slowdown=1.0, lead=2.0))
    >>> fleet.leave(1)
    >>> fleet.pace(0).workers
    1.5
    """

    def __init__(self, profiles: Sequence[Profile] = (), *, correct: bool = True):
        self._correct = correct
        self._estimates: dict[int, SlowdownEstimate] = {}
        self._first_qps = 0.0  # throughput of the first worker, the unit of speed, so that sums over equal workers are exact
        self._profiled: dict[int, float] = {}  # speed of each worker by its profile
        self._speeds: dict[int, float] = {}  # recent speed of each worker, 0 if it has left
        self._paces: dict[int, Pace] = {}  # a cache, cleared when a speed changes
        for worker, profile in enumerate(profiles):
            self.join(worker, profile)

    def join(self, worker: int, profile: Profile) -> None:
        """Add a worker."""
        self._estimates[worker] = SlowdownEstimate()
        self.resize(worker, profile)

    def resize(self, worker: int, profile: Profile) -> None:
        """Give a worker another profile, for example with smaller batches. The estimate of its slowdown stays."""
        qps = profile.throughput_qps(profile.rows[0].subnet)
        self._first_qps = self._first_qps or qps
        self._profiled[worker] = qps / self._first_qps
        self.come_back(worker)

    def observe(self, worker: int, profiled_ms: float, took_ms: float) -> None:
        """See `SlowdownEstimate.observe`. The worker itself calls it, without the lock."""
        if self._correct:
            self._estimates[worker].observe(profiled_ms, took_ms)

    def pace(self, worker: int) -> Pace:
        """The speeds for a decision of a live worker. O(1) while no worker's speed changes."""
        slowdown, speeds = self._estimates[worker].slowdown, self._speeds
        speed = self._profiled[worker] / slowdown
        if speed != speeds[worker]:
            self._set(worker, speed)
        if (pace := self._paces.get(worker)) is None:
            pace = self._paces[worker] = Pace(sum(speeds.values()) / speed, slowdown, max(speeds.values()) / speed)
        return pace

    def strength(self) -> tuple[float, int]:
        """Total speed of the live workers (1 is the speed of the first worker by its profile), and number of live workers."""
        speeds = self._speeds.values()
        return sum(speeds), sum(map(bool, speeds))

    def leave(self, worker: int) -> None:
        """Mark a worker as gone. It may come back."""
        self._set(worker, 0.0)

    def come_back(self, worker: int) -> None:
        """Mark a worker that left as alive again, with the slowdown that it had."""
        self._set(worker, self._profiled[worker] / self._estimates[worker].slowdown)

    def _set(self, worker: int, speed: float) -> None:
        self._speeds[worker] = speed
        self._paces.clear()

    def slowdown(self, worker: int) -> float:
        """How many times slower than its profile a worker runs, at least 1."""
        return self._estimates[worker].slowdown
