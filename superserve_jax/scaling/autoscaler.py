"""The autoscaler of a live server: it reads the server's counters, and adds and removes workers. No jax."""

import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from superserve_jax import errors, foreign
from superserve_jax.scaling.controller import Controller, Goal
from superserve_jax.scaling.recent import Recent
from superserve_jax.scaling.what_if import Question, Served
from superserve_jax.scheduling import policies
from superserve_jax.serving import threads
from superserve_jax.serving.server import Server

_log = logging.getLogger(__name__)

_LOOK_S = 0.05  # between two looks at the counter of arrivals
_STEP_S = 1.0  # between two steps of the controller
_PAUSE_S = 30.0  # after a worker could not be added
_PRESENT = ("idle", "deciding", "running", "answering")  # states of workers that serve


class Autoscaler:
    """Adds workers to a server while its accuracy is too low, and removes one when fewer would do (see `scaling.controller`).

    Use it as a context manager inside the server's. It has one thread, and one more for each worker that is starting. The
    simulations run in another process.

    Args:
      server: the server.
      make_device: returns what `Server.add_worker` takes: an engine or a device. It may take minutes, in a thread of its own.
        If it raises, the error is logged, and 30 s later it may be called again.
      target_accuracy: the served accuracy to keep, a fraction of 1. A query that missed its deadline counts as 0.
      most, least: the largest and the smallest number of workers.
      low_s: for how many seconds the accuracy must be below the target before workers are added.
      rest_s: how many seconds after a change no worker is removed.
      recent_s: the last seconds of traffic on which one fewer worker is tried.
      margin: by how much one fewer worker must exceed the target.
      policy: the name of the server's policy, for the simulations.
      clock: a function that returns monotonic seconds.

    Attributes:
      starting: how many workers have been ordered and do not serve yet.

    Raises ConfigError for impossible bounds and times, and for a target that no subnet reaches. Raises UnknownNameError for an
    unknown policy.

    The simulations know the arrivals, but not the SLOs, floors and lengths of single queries: they take the server's `slo_ms`,
    no floors, and the longest length. The worker that joined last is removed first. Nobody holds its engine afterwards.

    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> table = paper_profile()
    >>> with (
    ...     Server.from_engines([FakeEngine(table)], table) as server,
    ...     Autoscaler(server, lambda: FakeEngine(table), target_accuracy=0.76, most=4) as scaler,
    ... ):
    ...     scaler.starting
    0
    """

    def __init__(
        self,
        server: Server,
        make_device: Callable[[], Any],
        *,
        target_accuracy: float,
        most: int,
        least: int = 1,
        low_s: float = Goal.low_s,
        rest_s: float = Goal.rest_s,
        recent_s: float = Goal.recent_s,
        margin: float = Goal.margin,
        policy: str = "slackfit",
        clock: Callable[[], float] = time.monotonic,
    ):
        goal = Goal(target_accuracy, most, least, low_s=low_s, rest_s=rest_s, recent_s=recent_s, margin=margin)
        best = max(profile.rows[-1].accuracy for profile in server.profiles)
        if target_accuracy + margin >= best:
            raise errors.ConfigError(
                f"target_accuracy={target_accuracy} + margin={margin} must be below the best subnet's {best}; lower the target"
            )
        if not callable(make_device):
            raise errors.ConfigError(
                f"make_device must be a function that returns a device, got {foreign.text_of(make_device)}"
            )
        policies.check_name(policy)
        self._server, self._make_device, self._policy, self._clock = server, make_device, policy, clock
        self._controller = Controller(goal, self._forecast)
        self._recent = Recent(max(recent_s, low_s))
        self._lock = threading.Lock()  # guards `starting`
        self.starting = 0
        self._stepped_s = self._retry_s = float("-inf")
        self._seen: dict[str, Any] | None = None  # the snapshot at the last step
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Autoscaler":
        self._thread = threads.start(self._watch, "superserve-autoscaler")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its thread. A simulation that is running ends first. A worker that still starts is dropped when it is ready."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def look(self) -> None:
        """Reads the server's counters, and makes a decision each second. The thread calls it twenty times a second."""
        with self._lock:
            starting = self.starting  # before the snapshot, so that a worker which joins now counts twice rather than never
        now_s, seen = self._clock(), self._server.snapshot()
        self._recent.read(now_s, seen["queries"]["arrived"])
        if now_s < self._stepped_s + _STEP_S:
            return
        if self._server.health()["closed"]:
            self._stopped.set()
            return
        self._stepped_s, before, self._seen = now_s, self._seen, seen
        present = [worker["name"] for worker in seen["workers"] if worker["state"] in _PRESENT]
        by = self._controller.step(now_s, _served(before, seen), alive=len(present), starting=starting)
        if self._stopped.is_set():
            return  # it was closed meanwhile, and the rest of the simulations was left out
        if by > 0 and now_s >= self._retry_s:
            for _ in range(by):
                self._order()
        elif by < 0:
            self._remove(present[-1])

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            try:
                self.look()
            except Exception as error:
                foreign.log(_log, logging.WARNING, "the autoscaler failed: %s", foreign.text_of(error))

    def _order(self) -> None:
        with self._lock:
            self.starting += 1
        try:
            threads.start(self._start, "superserve-autoscaler-worker")
        except BaseException:
            self._started()
            raise

    def _started(self) -> None:
        with self._lock:
            self.starting -= 1

    def _start(self) -> None:
        try:
            device = self._make_device()
            if not self._stopped.is_set():
                name = self._server.add_worker(device)
                foreign.log(_log, logging.INFO, "%s was added", name)
                if self._stopped.is_set():  # it was closed while the worker joined
                    with contextlib.suppress(errors.SuperServeError):  # the server was closed, or the others have left
                        self._remove(name)
        except BaseException as error:
            self._retry_s = self._clock() + _PAUSE_S
            foreign.log(_log, logging.WARNING, "a worker could not be added: %s", foreign.text_of(error))
        finally:
            self._started()

    def _remove(self, name: str) -> None:
        self._server.remove_worker(name)
        foreign.log(_log, logging.INFO, "%s was removed", name)

    def _forecast(self, workers: int, seconds: float) -> Sequence[Served]:
        if self._stopped.is_set():
            return ()
        arrivals = self._recent.seconds(seconds)
        slowdowns = [w["slowdown"] for w in self._server.health()["per_worker"] if w["state"] in _PRESENT]
        if not arrivals or not slowdowns:
            return ()
        profile = self._server.profile.scaled(statistics.median(slowdowns))
        try:
            return Question(profile, self._policy, self._server.slo_ms, arrivals, workers).ask()
        except errors.SuperServeError as error:
            foreign.log(_log, logging.WARNING, "%s", foreign.text_of(error))
            return ()


def _served(before: dict[str, Any] | None, now: dict[str, Any]) -> Served:
    """What became of the queries between two snapshots. Nothing if the server's export was replaced meanwhile."""
    if before is None:
        return Served()

    def met(seen: dict[str, Any], rank: str) -> int:
        return seen["subnets"].get(rank, {"met": 0})["met"]

    more = {rank: met(now, rank) - met(before, rank) for rank in {**before["subnets"], **now["subnets"]}}
    if min(more.values(), default=0) < 0:
        return Served()
    queries = sum(now["queries"][what] - before["queries"][what] for what in ("met", "late", "expired", "refused"))
    correct = sum(count * now["subnets"][rank]["accuracy"] for rank, count in more.items() if count)
    return Served(queries, sum(more.values()), correct)
