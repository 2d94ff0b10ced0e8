"""Lets tasks of one name run after each other, also if their callers go away. No sockets."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from superserve_jax.gateway.failures import ClosingError


class Turns:
    """The tasks, by name. Everything runs in one event loop.

    >>> async def answer():
    ...     print("done")
    >>> asyncio.run(Turns().run("digits", answer))
    done
    """

    def __init__(self):
        self._locks, self._tasks, self._ended = dict[str, asyncio.Lock](), set[asyncio.Task[None]](), False

    async def run(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a task after the earlier ones of this name.

        If the caller is cancelled, a task that runs goes on. One that still waits for another is dropped.

        Raises what the task raises, or ClosingError after `end`.
        """
        lock = self._locks.setdefault(name, asyncio.Lock())
        await lock.acquire()
        if self._ended:
            lock.release()
            raise ClosingError
        task = asyncio.get_running_loop().create_task(work())
        self._tasks.add(task)

        def done(_: object) -> None:
            self._tasks.discard(task)
            lock.release()
            if not task.cancelled():
                task.exception()  # marks it as seen, since the caller may have gone

        task.add_done_callback(done)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise ClosingError from None

    def end(self) -> None:
        """Cancels all tasks. Their callers get ClosingError, and so do later ones."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
