"""Lost workers: their engine is in another process, which died, is silent or hangs. No jax.

1. A batch takes longer than usual, so the worker's engine is **suspect**. Policies do not count the worker meanwhile.
2. The engine raises EngineLostError, so it is **lost**. The worker leaves at once. Its batches go back to the queue and do not
   count as failures of a worker. So queries are answered late rather than never. A query may be what kills the process. So
   its batches become groups of retries, each runs alone (`retries.py`), and the bad query is given up in the end.
   Or the engine hangs longer than `stall_s`, and the watchdog abandons the worker.
3. A thread waits until the process answers again, and adds a worker for it. If no other worker is alive, queries wait for it
   about half a minute. If the lost worker is removed, nobody waits for its process any more.
"""

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from superserve_jax import errors, foreign
from superserve_jax.engines.base import Engine
from superserve_jax.serving.makers import Place

if TYPE_CHECKING:
    from superserve_jax.serving.pool import Pool
    from superserve_jax.serving.worker import Worker

_log = logging.getLogger(__name__)

_HOPE_S = 30.0  # for so long, queries wait for a lost worker if there is no other one
_LOOK_S = 0.2  # how often a waiting thread looks whether the server has been closed
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # after a worker could not be made; each pause is twice as long as the one before


def place_of(engine: Engine) -> Place | None:
    """The process that holds an engine and can make it again. None for an engine of this process."""
    place = getattr(engine, "place", None)
    return place if hasattr(place, "is_up") else None


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


@dataclasses.dataclass(eq=False, slots=True)
class _Return:
    """A worker that may come back.

    Args:
      place: the process of its engine.
      name: its name.
      hope_s: until then, queries wait for it.
      is_wanted: False once it was removed or has joined again.
      thread: waits for the process; None until it runs.
    """

    place: Place
    name: str
    hope_s: float
    is_wanted: bool = True
    thread: threading.Thread | None = None


class Lost:
    """The lost workers of a pool that may come back.

    Args:
      pool: the pool.
      add: returns the function that makes a worker at a place; None once there is no server any more.
    """

    def __init__(self, pool: "Pool", add: Callable[[], Callable[[Any], str] | None]):
        self._pool, self._add = pool, add
        self._returns: list[_Return] = []

    def locked_expect(self, worker: "Worker") -> None:
        """Begins to wait for a worker that is about to leave, if its engine is in another process and is why it leaves."""
        pool = self._pool
        if worker.place is None or not worker.alive or pool.closing or pool.exits or pool.policy_call.thread is worker.thread:
            return
        returns = _Return(worker.place, worker.name, pool.clock() + _HOPE_S)
        self._returns.append(returns)
        pool.defer(functools.partial(self._bring_back, returns))

    def locked_give_up(self, name: str) -> bool:
        """Ends the wait for the lost workers of this name. False if there are none."""
        found = [one for one in self._returns if one.name == name and one.is_wanted]
        for one in found:
            one.is_wanted = False
        return bool(found)

    def locked_join(self) -> None:
        """Ends the wait of the calling thread, if it adds a lost worker again. Raises ConfigError if that was removed."""
        for one in self._returns:
            if one.thread is threading.current_thread():
                if not one.is_wanted:
                    raise errors.ConfigError(f"{one.name} was removed before it joined again")
                one.is_wanted = False

    def locked_is_hoped(self) -> bool:
        """Whether the waiting queries may still hope for a lost worker. A pool that closes takes no worker.

        At the interpreter's exit they stay unanswered.
        """
        pool, now_s = self._pool, self._pool.clock()
        return pool.exits or (not pool.closing and any(one.is_wanted and one.hope_s > now_s for one in self._returns))

    def check(self) -> None:
        """Fails the waiting queries if no worker is alive, and they have waited long enough for a lost one."""
        pool = self._pool
        with pool.lock:
            if not pool.members.alive and not self.locked_is_hoped():
                pool.backlog.fail_all(pool.members.lost_error)
        pool.outbox.empty()

    def join(self) -> None:
        """Waits for the threads that wait for a process. The pool is closed or exits, so they end after one look.

        A thread that makes an engine ends by itself when that is done, since such a pool takes no worker. It may need a lock
        of the caller, so nobody waits for it.
        """
        end_s = time.monotonic() + 2 * _LOOK_S
        for one in (*self._returns,):
            if one.thread is not None and one.thread is not threading.current_thread():
                one.thread.join(max(end_s - time.monotonic(), 0.0))

    def _bring_back(self, one: _Return) -> None:
        one.thread = threading.current_thread()
        one.thread.name = f"superserve-return-{one.name}"
        pause_s = _PAUSE_S
        try:
            while not self._is_over(one):
                start_s = time.monotonic()
                is_up = self._is_up(one)
                if self._is_over(one) or (is_up and self._is_added(one)):
                    return
                if is_up is not False:  # something raised
                    self._pause(one, pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                elif (left_s := start_s + _LOOK_S - time.monotonic()) > 0:  # it answered at once that it is not up
                    self._pause(one, left_s)
        finally:
            with self._pool.lock:
                self._returns.remove(one)
            self.check()

    def _is_over(self, one: _Return) -> bool:
        return not one.is_wanted or self._pool.closing or self._pool.exits

    def _is_up(self, one: _Return) -> bool | None:
        """Whether the process answers. None if its place raised an error."""
        try:
            return bool(one.place.is_up(_LOOK_S))
        except BaseException as error:
            self._warn(one, error)
            return None

    def _is_added(self, one: _Return) -> bool:
        """Tries to add a worker. True also if the server is gone."""
        try:
            if (add := self._add()) is not None:
                add(one.place)
        except BaseException as error:
            self._warn(one, error)
            return False
        return True

    def _pause(self, one: _Return, seconds: float) -> None:
        with self._pool.lock:
            self._pool.changed.wait_for(lambda: self._is_over(one), seconds)

    def _warn(self, one: _Return, error: BaseException) -> None:
        if not self._is_over(one):
            foreign.log(_log, logging.WARNING, "a lost worker could not be added again: %s", foreign.text_of(error))
