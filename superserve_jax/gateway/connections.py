"""Connections of HTTP/1.1: requests in their order, one answer for each, and time limits.

This is a protocol of asyncio on the parser httptools. uvicorn's has neither these limits nor these rules, and a subclass would
override nearly all of its private methods.

The application answers one request of a connection at a time, in `_task`. Later requests wait in `_waiting`. If the client
closes the connection, the task is cancelled, and so are the queries that the task awaits.
"""

import asyncio
import collections
import contextlib
import logging
import time
from typing import Any

from superserve_jax import foreign
from superserve_jax.gateway import messages
from superserve_jax.gateway.access import Access
from superserve_jax.gateway.access_log import AccessLog
from superserve_jax.gateway.app import App
from superserve_jax.gateway.failures import ClosingError, RequestError
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.messages import Answer, Request
from superserve_jax.gateway.reader import Buffered, Reader

_log = logging.getLogger(__name__)

_GRACE_S = 0.1
"""How long an idle connection stays open when the gateway closes. A request may be on its way."""
_LINGER_S = 1.0
"""How long a refused request is read after the answer. Closing at once would reset the connection, and the answer with it."""
_MOST_WAITING, _MOST_WAITING_BYTES = 64, 1 << 18  # of the requests behind the one that is being answered
_POLL_S = 0.01
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Shared:
    """What the connections of a gateway share. Make it in the thread of the event loop.

    Args:
      app: answers the requests.
      limits: the limits.
      access: decides who may send requests.
      log: the access log.

    Attributes:
      connections: the open connections.
      buffered: the requests in memory.
      closing: whether the port is closed.
      expired: whether the closing gateway has waited for `drain_s` seconds.
    """

    def __init__(self, app: App, limits: Limits, access: Access, log: AccessLog | None = None):
        self.app, self.limits, self.access, self.log = app, limits, access, log
        self.loop = asyncio.get_running_loop()
        self.buffered = Buffered(limits, app.max_body_bytes)
        self.connections: set[Connection] = set()
        self.closing = self.expired = False

    async def emptied(self, limit_s: float) -> None:
        """Returns when no connection is open, or after `limit_s` seconds."""
        end_s = time.monotonic() + limit_s
        while self.connections and time.monotonic() < end_s:
            await asyncio.sleep(min(_POLL_S, limit_s))


class Connection(asyncio.Protocol):
    """One connection.

    Args:
      shared: what the connections share.
    """

    def __init__(self, shared: Shared):
        self._shared, self._app, self._loop = shared, shared.app, shared.loop
        self._transport: Any = None
        self._reader = Reader(shared.buffered, shared.access, time.monotonic, self._enter, self._go_on)
        self._waiting = collections.deque[Request]()
        self._waiting_bytes = 0
        self._answering: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._streaming = self._paused = False
        self._writable: asyncio.Event | None = None  # while the client does not read
        self._opened_s = self._since_s = time.monotonic()  # the second: when it became idle, unwritable or closing

    # -- called by the event loop -----------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Opens the connection. If the port is closed already, the connection serves at most one request."""
        self._transport = transport
        self._shared.connections.add(self)
        if len(self._shared.connections) > self._shared.limits.max_connections:
            self._reader.refuse(RequestError("the gateway has too many connections; try again later", status=503))
        elif self._shared.closing:
            self.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the queries of the client that has gone."""
        self._shared.connections.discard(self)
        self._reader.close()
        self._forget_waiting()
        if self._answering is not None:
            self._answering.left = True
            self._shared.buffered.drop(self._answering)
        self._transport = self._answering = None
        if self._writable is not None:
            self._writable.set()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Reads what has come."""
        self._reader.feed(data)

    def pause_writing(self) -> None:
        """The client does not read its answers. So the next request waits."""
        self._writable, self._since_s = asyncio.Event(), time.monotonic()

    def resume_writing(self) -> None:
        """The client has read its answers."""
        if self._writable is not None:
            self._writable.set()
            self._writable = None
        self._next()

    # -- called by the gateway --------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Closes the connection when the requests that have arrived are answered. An idle one is closed after `_GRACE_S`."""
        if self._streaming and self._task is not None:
            self._task.cancel()
            if self._writable is not None:  # its client does not read, so the end would never be sent
                self.abort()
        elif self._is_idle():
            self._loop.call_later(_GRACE_S, self._close_if_idle)

    def expire(self) -> None:
        """Answers the rest of the requests with status 503. Set `Shared.expired` before."""
        if self._reader.arriving is not None:
            self._reader.refuse(ClosingError())
        if self._task is not None:
            self._loop.call_soon(self._task.cancel)  # not now: a task that has not begun would end without an answer
        else:
            self._close_if_idle()

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def check(self, now_s: float) -> None:
        """Enforces the time limits."""
        limits, waited_s, arriving = self._shared.limits, now_s - self._since_s, self._reader.arriving
        if self._transport is None:
            return
        if (self._writable is not None or self._transport.is_closing()) and waited_s > limits.write_s:
            return self.abort()
        if self._transport.is_closing():
            return
        if arriving is not None and (arriving.received or self._answering is None):  # not: its client waits for the answer
            arriving_s = now_s - arriving.began_s
            if arriving_s > (limits.body_s if self._reader.in_body else limits.head_s):
                what = "body" if self._reader.in_body else "head"
                self._reader.refuse(RequestError(f"the {what} took {arriving_s:.0f} s; send it faster", status=408))
        elif self._is_idle() and self._writable is None:
            is_new = self._since_s == self._opened_s
            if waited_s > (min(limits.head_s, limits.idle_s) if is_new else limits.idle_s):
                self._close()

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _enter(self, request: Request) -> None:
        """Takes a request that is complete or refused."""
        self._waiting.append(request)
        self._waiting_bytes += request.held + request.head_bytes
        self._next()
        is_full = len(self._waiting) > _MOST_WAITING or self._waiting_bytes > _MOST_WAITING_BYTES
        if is_full and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _go_on(self) -> None:
        """Sends "100 Continue" to a client that waits for it. If an earlier request has no answer yet, that comes first."""
        if self._answering is None and not self._waiting:
            self._transport.write(_CONTINUE)

    def _next(self) -> None:
        """Starts the next request, if none is being answered and the client reads its answers."""
        while self._waiting and self._task is None and self._writable is None and self._transport is not None:
            request = self._answering = self._waiting.popleft()
            self._waiting_bytes -= request.held + request.head_bytes
            if request.error is None and self._shared.expired:
                request.error = ClosingError()
            if request.error is None:
                self._task = self._loop.create_task(self._answer(request))
            else:
                self._send(request, messages.failed(request.error))
                self._done()

    async def _answer(self, request: Request) -> None:
        try:
            answer = await self._app.answer(request)
            self._send(request, answer)
            if answer.stream is not None:
                await self._send_stream(request, answer.stream)
        except BaseException as e:
            foreign.log(_log, logging.ERROR, "an answer failed", error=e)
            self.abort()
        self._task, self._streaming = None, False
        self._done()
        self._next()

    def _send(self, request: Request, answer: Answer) -> None:
        """Writes an answer. Head and body are one packet."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._app.draining and not self._waiting and self._reader.arriving is None:
            request.keep_alive = False
            self._reader.deaf = True
        if answer.stream is not None:  # it may last for ever, so nothing may wait behind it
            request.keep_alive = False
            self._reader.stop()
            self._forget_waiting()
            self._resume_reading()  # or the connection would not notice that its client goes away
        data = messages.encoded(answer, request)
        self._transport.write(data)
        if (log := self._shared.log) is not None:
            client = (self._transport.get_extra_info("peername") or ("",))[0]
            log.add(client, request, answer, sent=len(data), seconds=time.monotonic() - request.began_s)

    async def _send_stream(self, request: Request, stream: Any) -> None:
        """Sends a body in parts, until it ends, its client goes away, or the gateway closes."""
        self._streaming, has_body = True, request.method != "HEAD"
        with contextlib.suppress(asyncio.CancelledError):
            async with contextlib.aclosing(stream):
                async for part in stream:
                    if self._writable is not None:
                        await self._writable.wait()
                    if self._transport is None:
                        return
                    if part and has_body:
                        self._transport.write(part)

    def _done(self) -> None:
        """The answer is written. Closes the connection, or waits for the next request."""
        request, self._answering, self._since_s = self._answering, None, time.monotonic()
        if request is None or self._transport is None:
            return
        self._shared.buffered.drop(request)
        if not request.keep_alive:
            return self._close(linger=request.error is not None)
        self._resume_reading()
        if (arriving := self._reader.arriving) is not None and not self._waiting:
            arriving.began_s = self._since_s  # its client may have waited for this answer
            if self._reader.in_body and b"expect" in arriving.headers:
                self._go_on()
        if self._shared.closing:
            self.drain()

    def _resume_reading(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _forget_waiting(self) -> None:
        for request in self._waiting:
            self._shared.buffered.drop(request)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _is_idle(self) -> bool:
        return self._reader.arriving is None and self._answering is None and not self._waiting

    def _close_if_idle(self) -> None:
        if self._is_idle():
            self._close()

    def _close(self, *, linger: bool = False) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._reader.deaf, self._since_s = True, time.monotonic()
        if linger and transport.can_write_eof():
            transport.write_eof()
            self._loop.call_later(_LINGER_S, transport.close)
        else:
            transport.close()
