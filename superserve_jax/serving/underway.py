"""The batches of one worker that are under way, and since when the first of them may be stuck. No jax."""

from collections.abc import Callable
from typing import final

from superserve_jax.serving.flight import Flight


@final
class Underway:
    """The batches that a worker has taken and not yet answered. The caller holds the pool's lock, except for `excusing`.

    Attributes:
      flights: the batches, in the order in which they run. There may be two if the device can compute one while the host
        prepares the next (`engines.base.Overlapping`).
      has_landed: whether the first batch has its outputs. Its done-callbacks may still run.
      watched_s: since when the first batch may be stuck.
    """

    def __init__(self):
        self.flights: list[Flight] = []
        self.has_landed = False
        self.watched_s = 0.0
        self._in_callbacks = False  # done-callbacks of other queries run in the worker's thread

    @property
    def is_answering(self) -> bool:
        """Whether the worker's thread is in done-callbacks, and so not in the engine."""
        return self.has_landed or self._in_callbacks

    def remove(self, flight: Flight, *, free_s: float, now_s: float) -> bool:
        """Removes a batch that has ended. The device works on the next one now, and its time limit starts at `now_s`.

        Args:
          flight: the batch.
          free_s: the device did not begin with the next batch before this time.
          now_s: the time now.

        Returns:
          False if the batch was not there: the worker has been abandoned, and its batches were given back.
        """
        if flight not in self.flights:
            return False
        self.flights.remove(flight)
        self.watched_s = now_s
        for other in self.flights:
            other.started_s = max(other.started_s, free_s)
        return True

    def take_all(self, *, hung: bool) -> tuple[list[Flight], Flight | None]:
        """Removes all batches. Returns them, and the one that the worker was handing over, waiting for or answering.

        Args:
          hung: whether the engine hangs.
        """
        flights, self.flights = self.flights, []
        busy = next((flight for flight in flights if flight.launched is flight.failure is None), None)
        if busy is None and flights and (hung or self.has_landed):
            busy = flights[0]
        return flights, busy

    def excuse(self, seconds: float) -> None:
        """Does not count a time against the engine."""
        self.watched_s += seconds

    def excusing(self, call: Callable[[], object], clock: Callable[[], float]) -> None:
        """Makes a call that runs done-callbacks. Slow ones are not the engine's fault, so their time does not count."""
        self._in_callbacks, since_s = True, clock()
        call()
        self.excuse(clock() - since_s)
        self._in_callbacks = False

    def ran_s(self, now_s: float) -> float:
        """How long the first batch has run; 0 if there is none."""
        return now_s - self.watched_s if self.flights else 0.0

    def is_stuck(self, now_s: float, *, stall_s: float, excused_s: float) -> bool:
        """Whether the first batch takes too long. `excused_s` does not count: the process stood still."""
        if not self.flights or self.is_answering:
            return False
        if excused_s:
            self.watched_s = min(self.watched_s + excused_s, now_s)
        return self.ran_s(now_s) > self.flights[0].patience_s(stall_s)
