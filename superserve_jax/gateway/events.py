"""Server-sent events: one sample a second, made in the gateway's loop, for every live page that is open.

A timer of the loop takes the sample and puts its bytes into the queue of each stream. So a page costs one write a second. A
stream that is ten seconds behind ends. If its client reads again, it may connect again. If not, the connection is closed after
`Limits.write_s`. Streams also end with their connection, and when the gateway closes (see `messages.Answer`).
"""

import asyncio
from collections.abc import AsyncGenerator

from superserve_jax.gateway.failures import ClosingError, RequestError
from superserve_jax.gateway.messages import Answer
from superserve_jax.gateway.sampling import Sampler

EVERY_S = 1.0
MAX_STREAMS = 200
"""Number of pages that may be open at a time."""
_BEHIND = 10  # events that may wait for a slow reader
_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # asks a proxy to pass each event on at once
    (b"x-content-type-options", b"nosniff"),
)

_Queue = asyncio.Queue[bytes | None]


class Events:
    """The timer and the streams. Everything runs in the event loop.

    Args:
      sampler: makes the samples.
      most: how many streams may be open at a time.
      every_s: the time between two samples.

    Attributes:
      closed: whether new streams are refused, because the gateway closes.
    """

    def __init__(self, sampler: Sampler, *, most: int = MAX_STREAMS, every_s: float = EVERY_S):
        self._sampler, self._most, self._every_s = sampler, most, every_s
        self._streams: set[_Queue] = set()
        self._next_s, self.closed = 0.0, False

    @property
    def open(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def start(self) -> None:
        """Takes the first sample, and then one every second."""
        loop = asyncio.get_running_loop()
        self._next_s = loop.time()
        self._tick(loop)

    def answer(self) -> Answer:
        """A stream of events: first the samples of the last minutes, and then each new one.

        Raises ClosingError if the gateway closes, or RequestError (503) if too many streams are open.
        """
        if self.closed:
            raise ClosingError("the gateway is shutting down; connect to another replica")
        if len(self._streams) >= self._most:
            raise RequestError(f"{self._most} pages are open already; close one, and try again", status=503)
        return Answer(headers=_HEADERS, stream=self._stream())

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        queue = _Queue(_BEHIND)
        queue.put_nowait(self._sampler.history())
        self._streams.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield b"data: %b\n\n" % event
        finally:
            self._streams.discard(queue)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._next_s = max(self._next_s + self._every_s, loop.time())  # after a pause, the missed samples stay missing
        loop.call_at(self._next_s, self._tick, loop)
        event = self._sampler.step()
        for queue in [*self._streams]:
            if queue.full():
                self._streams.remove(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)
