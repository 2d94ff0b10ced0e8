"""The rule of the autoscaler: pure code on any clock. No jax.

- The accuracy of a period is **low** if it is below the target, on the mean and in at least half of its readings. So a short
  burst does not count: it is over before a new worker serves.
- **Add** workers if the accuracy was low in the last `low_s` seconds. The simulator says how many: the fewest that would have
  prevented it. Workers that are still starting count as present.
- **Remove** one if the simulator says that with one fewer, the accuracy would not have been low in any `low_s` seconds of the
  last `recent_s`, even with a target that is higher by `margin`. Within the first `recent_s`, all traffic so far is tried. No
  worker is removed within `rest_s` after a change, or while others start.

The served accuracy is the mean over all queries of the accuracy of their subnet. A query that missed its deadline counts as 0.
So it is the paper's objective, attainment times accuracy. It falls when the server degrades, and further when it misses.
"""

import bisect
import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from superserve_jax import errors
from superserve_jax.scaling.what_if import Served, total

Forecast = Callable[[int, float], Sequence[Served]]
"""`forecast(workers, seconds)`: readings of the last seconds, if there had been so many workers. Empty if that is unknown."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What an autoscaler aims at, and how fast it acts.

    Args:
      target_accuracy: the served accuracy to keep, a fraction of 1. A query that missed its deadline counts as 0.
      most: the largest number of workers.
      least: the smallest number of workers.
      low_s: how long the accuracy is averaged before workers are added, and the least time between two simulations.
      rest_s: how long after a change no worker is removed.
      recent_s: the last seconds of traffic on which one fewer worker is tried.
      margin: by how much one fewer worker must exceed the target. It prevents that the next fluctuation adds the worker again.

    Raises ConfigError for impossible values.

    >>> Goal(target_accuracy=0.76, most=16).low_s
    300.0
    """

    target_accuracy: float
    most: int
    least: int = 1
    low_s: float = 300.0
    rest_s: float = 600.0
    recent_s: float = 3600.0
    margin: float = 0.002

    def __post_init__(self):
        if not 0 < self.target_accuracy < 1:
            raise errors.ConfigError(f"target_accuracy must be a fraction between 0 and 1, got {self.target_accuracy!r}")
        if not (isinstance(self.least, int) and isinstance(self.most, int) and 1 <= self.least <= self.most):
            raise errors.ConfigError(
                f"expected whole numbers of workers, 1 <= least <= most, got least={self.least!r} and most={self.most!r}"
            )
        errors.check_from_zero(self, "low_s", "rest_s", "recent_s", "margin")


class Controller:
    """Decides how many workers to add or to remove. One thread uses it.

    Args:
      goal: what it aims at.
      forecast: see `Forecast`. It may be slow: it is only called when a change seems due, at most about once in `low_s`.

    >>> forecast = lambda workers, seconds: [Served(queries=1, met=1, correct=0.74 + 0.005 * workers)]
    >>> controller = Controller(Goal(0.76, most=8, low_s=60.0), forecast)
    >>> hundred = Served(queries=100, met=100, correct=75.0)
    >>> for minute, starting in enumerate([0, 0, 2]):
    ...     print(controller.step(60.0 * minute, hundred, alive=2, starting=starting))
    0
    2
    0
    """

    def __init__(self, goal: Goal, forecast: Forecast):
        self.goal, self._forecast = goal, forecast
        self._readings: collections.deque[tuple[float, Served]] = collections.deque()  # (its beginning, what was served)
        self._first_s = -math.inf  # the first step; no traffic is known before it
        self._last_s: float | None = None  # the step before
        self._changed_s = self._asked_s = -math.inf

    def step(self, now_s: float, served: Served, *, alive: int, starting: int) -> int:
        """The number of workers to add now; a negative number to remove.

        Args:
          now_s: the time.
          served: what became of the queries since the last step.
          alive: how many workers serve.
          starting: how many more have been ordered.
        """
        goal, workers = self.goal, alive + starting
        begin_s, self._last_s = self._last_s, now_s
        if begin_s is None:
            self._first_s = self._changed_s = now_s
        else:
            self._readings.append((begin_s, served))
        if workers < goal.least:
            return self._change(now_s, goal.least - workers)
        if alive > goal.most and not starting:  # a worker that has just joined may count as starting as well
            return self._change(now_s, -1)
        while len(self._readings) > 1 and self._readings[1][0] <= now_s - goal.low_s:
            self._readings.popleft()
        if not self._readings or self._readings[0][0] > now_s - goal.low_s:
            return 0  # the last change is too recent
        readings = [reading for _, reading in self._readings]
        if _is_low(readings, goal.target_accuracy):
            return self._more(now_s, workers, starting)
        return self._fewer(now_s, workers, starting, readings)

    def _more(self, now_s: float, workers: int, starting: int) -> int:
        goal = self.goal
        least = workers if starting else workers + 1
        if least > goal.most or now_s - self._asked_s < goal.low_s:
            return 0
        self._asked_s = now_s

        def reaches(count: int) -> bool:
            return not _is_low(self._forecast(count, goal.low_s), goal.target_accuracy)

        needed = least + bisect.bisect_left(range(least, goal.most), True, key=reaches)
        return self._change(now_s, needed - workers) if needed > workers else 0

    def _fewer(self, now_s: float, workers: int, starting: int, readings: Sequence[Served]) -> int:
        goal = self.goal
        if starting or workers <= goal.least or now_s - self._changed_s < goal.rest_s or now_s - self._asked_s < goal.low_s:
            return 0
        needed = goal.target_accuracy + goal.margin
        if _is_low(readings, needed):
            return 0  # one fewer would not be more accurate
        self._asked_s = now_s
        found = self._forecast(workers - 1, goal.recent_s)
        size = self._covering(len(found), now_s)
        parts = (found[i : i + size] for i in range(max(len(found) - size, 0) + 1))
        return self._change(now_s, -1) if found and not any(_is_low(part, needed) for part in parts) else 0

    def _covering(self, count: int, now_s: float) -> int:
        """How many readings in a row cover `low_s`, if so many are spread over the recent traffic."""
        known_s = min(self.goal.recent_s, now_s - self._first_s)
        return max(math.ceil(count * self.goal.low_s / known_s), 1) if known_s else 1

    def _change(self, now_s: float, by: int) -> int:
        self._changed_s = now_s
        self._readings.clear()
        return by


def _is_low(readings: Sequence[Served], target: float) -> bool:
    """Whether the mean is below the target, and at least half of the readings are."""
    accuracies = [reading.accuracy for reading in readings if reading.accuracy is not None]
    mean = total(readings).accuracy
    return mean is not None and mean < target and 2 * sum(a < target for a in accuracies) >= len(accuracies)
