"""A simulated day: traffic that changes by the minute, nodes that take minutes to start, and the controller. No jax.

A day has too many queries to simulate them all. So `sample_s` seconds of traffic at the minute's rate represent each minute.
The queue is empty at the start of each minute.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scaling import what_if
from superserve_jax.scaling.controller import Controller, Goal
from superserve_jax.scaling.what_if import Served
from superserve_jax.simulation import traces

MINUTE_S = 60.0


@dataclasses.dataclass(frozen=True, eq=False)
class Day:
    """A simulated day, minute by minute.

    Args:
      rate_qps: [minutes] arrivals per second.
      alive: [minutes] workers that served.
      paid: [minutes] the same, and workers that were starting.
      served: [minutes] what became of the simulated queries.
      changes: (minute, number of workers added then; negative if removed), in ascending order.
    """

    rate_qps: np.ndarray
    alive: np.ndarray
    paid: np.ndarray
    served: tuple[Served, ...]
    changes: tuple[tuple[int, int], ...]

    @property
    def attainment(self) -> float:
        """The share of all queries that met their deadline."""
        whole = what_if.total(self.served)
        return whole.met / whole.queries if whole.queries else 1.0

    @property
    def accuracy(self) -> float:
        """The mean accuracy over the queries that met their deadline. NaN if there are none."""
        whole = what_if.total(self.served)
        return whole.correct / whole.met if whole.met else float("nan")

    @property
    def worker_hours(self) -> float:
        """Hours that all workers together were paid for, also while they started."""
        return float(self.paid.sum()) * MINUTE_S / 3600

    @property
    def turns(self) -> int:
        """How often a worker was added after one had been removed, or the other way round."""
        signs = np.sign([by for _, by in self.changes])
        return int((np.diff(signs) != 0).sum())


def simulate_day(
    profile: Profile,
    rates_qps: Sequence[float] | np.ndarray,
    goal: Goal,
    *,
    policy: str = "slackfit",
    first: int | None = None,
    start_s: float = 180.0,
    sample_s: float = 1.0,
    cv2: float = 1.0,
    slo_ms: float = 36.0,
    seed: int = 0,
) -> Day:
    """Simulates an autoscaled server on traffic that changes by the minute.

    A fixed fleet of n workers is a goal with `least` and `most` of n.

    Args:
      profile: the profile of all workers.
      rates_qps: [minutes] arrivals per second.
      goal: see `controller.Goal`. Decisions are made once a minute.
      policy: the policy's name.
      first: the number of workers at the beginning. None takes `goal.least`.
      start_s: how long a new worker takes until it serves, rounded up to minutes.
      sample_s: how many seconds of each minute are simulated.
      cv2: squared coefficient of variation of the gaps between arrivals.
      slo_ms: the SLO of all queries.
      seed: seed of the arrivals.

    Raises ConfigError for rates below 0, impossible lengths of time, and a first number of workers below 1.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> goal, rates_qps = Goal(0.77, most=4), [200.0] * 10 + [1500.0] * 20
    >>> day = simulate_day(paper_profile().scaled(1.9), rates_qps, goal, sample_s=0.2)
    >>> day.alive[[0, 12, 29]].tolist(), day.worker_hours < 30 * 4 / 60
    ([1, 1, 3], True)
    """
    traces.check(sample_s=sample_s, slo_ms=slo_ms)
    traces.check(0, start_s=start_s, cv2=cv2)
    rates = np.asarray(rates_qps, np.float64)
    if rates.ndim != 1 or not (rates >= 0).all():
        raise errors.ConfigError("rates_qps must be a list of rates from 0 up, one for each minute")
    if not (first is None or first >= 1):
        raise errors.ConfigError(f"first must be a number of workers from 1 up, got {first!r}")

    @functools.cache
    def served(minute: int, workers: int) -> Served:
        if not rates[minute]:
            return Served()
        shape = {"rate_qps": rates[minute], "cv2": cv2, "duration_s": sample_s, "slo_ms": slo_ms}
        return what_if.serve(profile, policy, traces.gamma(**shape, seed=seed * len(rates) + minute), workers)

    def forecast(workers: int, seconds: float) -> list[Served]:
        last = max(int(seconds / MINUTE_S), 1)
        return [served(minute, workers) for minute in range(max(now - last + 1, 0), now + 1)]

    now = 0
    controller, starts = Controller(goal, forecast), -int(-start_s // MINUTE_S)
    alive = goal.least if first is None else first
    ready: list[int] = []  # the minutes at which workers that have been ordered begin to serve
    controller.step(0.0, Served(), alive=alive, starting=0)
    record: list[tuple[int, int, Served]] = []
    changes: list[tuple[int, int]] = []
    for now in range(len(rates)):
        alive += sum(minute <= now for minute in ready)
        ready = [minute for minute in ready if minute > now]
        record.append((alive, alive + len(ready), served(now, alive)))
        by = controller.step(MINUTE_S * (now + 1), record[-1][2], alive=alive, starting=len(ready))
        if by:
            changes.append((now, by))
        alive += min(by, 0)
        ready += [now + 1 + starts] * max(by, 0)
    counts = np.array([(a, p) for a, p, _ in record], np.int64).reshape(-1, 2)
    return Day(rates, counts[:, 0], counts[:, 1], tuple(s for *_, s in record), tuple(changes))
