"""Threads for long work, during which the event loop serves other clients: inflate, compress, parse, split texts.

`asyncio.to_thread` is not used. When the loop or the process ends, Python waits for its threads, however long they work.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from superserve_jax import errors

_T = TypeVar("_T")

_MOST = (os.cpu_count() or 1) + 4  # threads for work that does not hold Python's lock for long
SHORT_BYTES, FEW_ROWS = 1 << 18, 256
"""Bytes of a request, and rows of an answer, that are read and written in the event loop. Longer ones keep others waiting."""


class Threads:
    """Runs functions in daemon threads, each in a new one. The process does not wait for them at its end.

    Args:
      most: how many may run at a time. The next ones wait, in their order.

    >>> asyncio.run(Threads(1).run(sum, [1, 2]))
    3
    """

    def __init__(self, most: int):
        self._free = asyncio.Semaphore(most)

    async def run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Returns what the function returns, or raises what it raises.

        If the task is cancelled, a function that waits is not started. One that runs goes on, and its result is dropped.
        """
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            self._free.release()
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = function(*arguments)
            except BaseException as e:
                error = e
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result, error)

        try:
            with errors.StartingThreads():
                threading.Thread(target=work, name="superserve-work", daemon=True).start()
        except BaseException:
            self._free.release()
            raise
        return await future


class LongWork:
    """The threads of one gateway for the long work of both ports.

    Attributes:
      many: for functions that release Python's lock most of the time: inflate, compress, split texts into tokens.
      one: a single thread, for functions that hold the lock: read and write long messages. More would only harm.
    """

    def __init__(self):
        self.many, self.one = Threads(_MOST), Threads(1)
