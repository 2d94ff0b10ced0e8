"""Lost workers: their engine is in another process, which died or is silent. No jax.

1. A batch takes longer than usual, so the worker's engine is **suspect**. Policies do not count the worker meanwhile.
2. The engine raises EngineLostError, so it is **lost**. The worker leaves at once. Its batches go back to the queue and do not
   count as failures of a worker. So queries are answered late rather than never. A query may be what kills the process. So
   its batches become groups of retries, each runs alone (`retries.py`), and the bad query is given up in the end.
3. A thread waits until the process answers again, and adds a worker for it. If no other worker is alive, queries wait for it
   about half a minute.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from superserve_jax import foreign
from superserve_jax.serving import threads
from superserve_jax.serving.flight import Failure
from superserve_jax.serving.makers import Place

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.worker import Worker

_log = logging.getLogger(__name__)

_HOPE_S = 30.0  # for so long, queries wait for a lost worker if there is no other one
_LOOK_S = 0.2  # how often a waiting thread looks whether the server has been closed
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # after a worker could not be made; each pause is twice as long as the one before


class Suspicion:
    """Whether the engine of a worker may be lost during one batch. Only the worker's thread calls it.

    Args:
      pool: the pool.
      worker: the worker.
    """

    __slots__ = ("_is_raised", "_pool", "_worker")

    def __init__(self, pool: "Pool", worker: "Worker"):
        self._pool, self._worker, self._is_raised = pool, worker, False

    def raised(self) -> None:
        """A batch is late."""
        with self._pool.lock:
            if self._worker.present:
                self._pool.members.fleet.leave(self._worker.index)
        self._is_raised = True

    def clear(self) -> None:
        """The engine has answered."""
        if self._is_raised:
            self._is_raised = False
            with self._pool.lock:
                if self._worker.alive:
                    self._pool.members.fleet.come_back(self._worker.index)


class Lost:
    """The lost workers of a pool that may come back.

    Args:
      pool: the pool.
      add: returns the function that makes a worker at a place; None once there is no server any more.

    Attributes:
      expected: how many lost workers the waiting queries hope for. Read and written under the pool's lock.
    """

    def __init__(self, pool: "Pool", add: Callable[[], Callable[[Any], object] | None]):
        self._pool, self._add = pool, add
        self.expected = 0
        self._threads: list[threading.Thread] = []

    def leave(self, worker: "Worker", failure: Failure) -> bool:
        """Takes a worker out of service whose engine is lost. Its own thread calls this. Returns False: it must leave."""
        pool, place = self._pool, cast(Place | None, getattr(worker.engine, "place", None))
        foreign.log(_log, logging.WARNING, "%s is lost: %s", worker.name, failure.text)
        foreign.forget_frames(failure.error)
        comes_back = hasattr(place, "is_up")
        with pool.lock:
            worker.failures.locked_note(failure)
            comes_back = comes_back and worker.alive and not pool.closing
            self.expected += comes_back
        try:
            pool.leave([worker], "lost", pool.members.lost_error)
            if place is not None and comes_back:
                thread = threads.start(functools.partial(self._bring_back, place), f"superserve-return-{worker.name}")
                with pool.lock:
                    self._threads = [*(t for t in self._threads if t.is_alive()), thread]
                comes_back = False  # the thread hopes from now on
        finally:
            if comes_back:
                self._give_up_hope()
        return False

    def join(self) -> None:
        """Waits for the threads that wait for a process. The pool is closed, so they end after one look.

        A thread that makes an engine ends by itself when that is done, since a closed pool takes no worker. It may need a lock
        of the caller, so nobody waits for it.
        """
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * _LOOK_S)

    def _bring_back(self, place: Place) -> None:
        pool = self._pool
        end_s, hopes, pause_s = pool.clock() + _HOPE_S, True, _PAUSE_S
        try:
            while not pool.closing:
                start_s = time.monotonic()
                if self._is_up(place):
                    if self._is_added(place):
                        return
                    pool.pause_until_closed(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                elif (left_s := start_s + _LOOK_S - time.monotonic()) > 0:  # it answered at once that it is not up
                    pool.pause_until_closed(left_s)
                if hopes and pool.clock() > end_s:
                    hopes = False
                    self._give_up_hope()
        finally:
            if hopes:
                self._give_up_hope()

    def _is_up(self, place: Place) -> bool:
        try:
            return place.is_up(_LOOK_S)
        except BaseException as error:
            self._warn(error)
            return False

    def _is_added(self, place: Place) -> bool:
        """Tries to add a worker. True also if nobody wants one any more."""
        try:
            if (add := self._add()) is not None:
                add(place)
        except BaseException as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: BaseException) -> None:
        if not self._pool.closing:
            foreign.log(_log, logging.WARNING, "a lost worker could not be added again: %s", foreign.text_of(error))

    def _give_up_hope(self) -> None:
        """Queries do not wait for this worker any longer."""
        pool = self._pool
        with pool.lock:
            self.expected -= 1
            if not pool.members.alive and not self.expected:
                pool.backlog.fail_all(pool.members.lost_error)
        pool.outbox.empty()
