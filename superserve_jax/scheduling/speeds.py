"""How fast each worker is: what its profile says of it, and how it has run of late. Server and simulator share it. No jax.

A profile is measured once; a device that others share, or that throttles, runs slower than that later on, and a policy that
trusts the profile then misses deadlines. A device that runs f times slower than its profile is, to a policy, the same as one
that does not, on which time runs f times faster: slack and SLO are f times shorter, and f times as much traffic comes in a
second. So `dispatch` puts the correction into the state that the policy sees, and no table is made anew.

Workers that differ, by their profiles or by how they run, differ in what they carry: a policy counts the workers in units of
the one that asks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from superserve_jax.profile import Profile

_MEMORY_MS = 100.0  # of computing: a fifth of a second of a worker that is busy for half of it
_SHARE = 0.1  # of the estimate that one batch may decide, however long it is
_SURPRISE = 0.3  # a batch counts for no more than this beyond the estimate, as the logarithm of a ratio
_IGNORED = 0.05  # as well: less is jitter, for which policies keep a reserve
_LOG_LIMIT = math.log(8.0)  # a device that is even slower is no longer fit for what was measured of it


class SlowdownEstimate:
    """By how much one worker is slower than its profile says.

    The estimate is a running mean of the logarithm of the batches' latency over the profiled one, in which long batches count
    for more and none for much (Huber's clipped mean): it follows a device that becomes slower for good in some tens of
    batches, and one batch that takes fifty times as long moves it by 3 % at most. Never faster than the profile: that
    something ran fast is no reason to promise more. Below 5 % nothing is corrected.

    >>> drift = SlowdownEstimate()
    >>> for _ in range(100):
    ...     drift.observe(20.0, 30.0)
    >>> round(drift.slowdown, 2)
    1.5
    >>> for took_ms in [1000.0, *[20.0] * 100]:
    ...     drift.observe(20.0, took_ms)
    >>> drift.slowdown
    1.0
    """

    __slots__ = ("_log", "slowdown")

    def __init__(self):
        self._log = 0.0
        self.slowdown = 1.0  # at least 1

    def observe(self, profiled_ms: float, took_ms: float) -> None:
        """A batch took `took_ms`; by its profile it should have been `profiled_ms`. O(1), from one thread at a time."""
        surprise = (math.log(took_ms / profiled_ms) if took_ms > 0 else -math.inf) - self._log
        if surprise > _SURPRISE:
            surprise = _SURPRISE
        elif surprise < -_SURPRISE:
            surprise = -_SURPRISE
        log = self._log + surprise * (profiled_ms / _MEMORY_MS if profiled_ms < _SHARE * _MEMORY_MS else _SHARE)
        self._log = log = 0.0 if log < 0 else log if log < _LOG_LIMIT else _LOG_LIMIT
        self.slowdown = math.exp(log) if log > _IGNORED else 1.0


class Pace(NamedTuple):
    """What a decision needs to know of the workers' speeds.

    Args:
      workers: how many are alive, in units of the one that asks.
      slowdown: how many times slower than its profile that one is.
      lead: how many times as fast as that one the fastest live worker is; at least 1.
    """

    workers: float = 1.0
    slowdown: float = 1.0
    lead: float = 1.0


class Fleet:
    """The workers' speeds. The caller holds a lock, but for `observe`.

    Args:
      profiles: of the workers 0, 1, ...; others may join.
      correct: whether drift is followed; else every worker is as fast as its profile says.

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
        self._drifts: dict[int, SlowdownEstimate] = {}
        self._first_qps = 0.0  # throughput of the first worker, in units of which those that are alike are whole numbers
        self._profiled: dict[int, float] = {}
        self._speeds: dict[int, float] = {}  # of late; 0 of a worker that is gone
        self._paces: dict[int, Pace] = {}  # that still hold
        for worker, profile in enumerate(profiles):
            self.join(worker, profile)

    def join(self, worker: int, profile: Profile) -> None:
        """A worker is new."""
        qps = profile.throughput_qps(profile.rows[0].subnet)
        self._first_qps = self._first_qps or qps
        self._drifts[worker], self._profiled[worker] = SlowdownEstimate(), qps / self._first_qps
        self._set(worker, self._profiled[worker])

    def resize(self, worker: int, profile: Profile) -> None:
        """A worker carries less from now on, as this profile says, and has run of late as it did."""
        self._profiled[worker] = profile.throughput_qps(profile.rows[0].subnet) / self._first_qps
        self._set(worker, self._profiled[worker] / self._drifts[worker].slowdown)

    def observe(self, worker: int, profiled_ms: float, took_ms: float) -> None:
        """See `Drift.observe`; called by the worker itself, without a lock."""
        if self._correct:
            self._drifts[worker].observe(profiled_ms, took_ms)

    def pace(self, worker: int) -> Pace:
        """For a decision of a live worker. O(1) as long as no worker's speed changes."""
        slowdown, speeds = self._drifts[worker].slowdown, self._speeds
        speed = self._profiled[worker] / slowdown
        if speed != speeds[worker]:
            self._set(worker, speed)
        if (pace := self._paces.get(worker)) is None:
            pace = self._paces[worker] = Pace(sum(speeds.values()) / speed, slowdown, max(speeds.values()) / speed)
        return pace

    def strength(self) -> tuple[float, int]:
        """What all live workers carry together, in units of the first worker as profiled, and how many they are."""
        speeds = self._speeds.values()
        return sum(speeds), sum(map(bool, speeds))

    def leave(self, worker: int) -> None:
        """A worker is gone."""
        self._set(worker, 0.0)

    def come_back(self, worker: int) -> None:
        """It is there again."""
        self._set(worker, self._profiled[worker] / self._drifts[worker].slowdown)

    def _set(self, worker: int, speed: float) -> None:
        self._speeds[worker] = speed
        self._paces.clear()

    def slowdown(self, worker: int) -> float:
        """How many times slower than its profile a worker has been of late; 1 where it was not slower."""
        return self._drifts[worker].slowdown
