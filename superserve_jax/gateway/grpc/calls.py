"""Calls of gRPC as this package writes them: functions of messages. Their errors become statuses as over HTTP."""

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

import grpc

from superserve_jax import foreign
from superserve_jax.gateway import bodies, failures, reader, sockets
from superserve_jax.gateway.access_log import AccessLog
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import statuses
from superserve_jax.gateway.reader import Buffered

_log = logging.getLogger(__name__)

_FROM_CLIENTS = ("ExecuteBatchError", "Invalid encoding on")
# grpc logs a traceback for each answer whose client has gone, and for metadata that are not UTF-8. Clients could fill the log.
logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: not str(record.msg).startswith(_FROM_CLIENTS))

SMALL_S = 10.0
"""How long a small message may take."""
MOST_OPEN = {"inference": 4096, "change": 64, "standing": 256, "short": 1024}
"""How many calls of each kind may be open at once. Further ones get status RESOURCE_EXHAUSTED.

Calls that stand open need no messages, and some need no token. So each kind has places of its own.
"""
_TICK_S = 1.0  # the longest time between two checks of the time limits


Allows = Callable[[bytes | None], bool]
"""Whether a call with this `authorization` in its metadata may be answered."""


class Method(NamedTuple):
    """A method of a service.

    Args:
      path: such as "/grpc.health.v1.Health/Check".
      answer: gets a call, reads its messages, and returns the bytes of the response. If it `streams`, it writes responses.
      streams: whether there may be several responses.
      allows: whether a call has the token; None allows all.
      probe: whether it is answered without the token, too. What it does not know, it then says only to calls with the token.
      kind: a key of `MOST_OPEN`.
    """

    path: str
    answer: "Callable[[Call], Coroutine[Any, Any, bytes | None]]"
    streams: bool = False
    allows: Allows | None = None
    probe: bool = False
    kind: str = "short"


class Calls:
    """The calls of a port.

    Args:
      buffered: the requests in memory, of this port and of HTTP.
      log: the access log.

    Attributes:
      open: the calls in progress, by kind. Those that wait until their client takes an error are not among them.
      reads_s, writes_s: when calls end that wait for a message, or until their client reads an answer.
    """

    def __init__(self, buffered: Buffered, log: AccessLog | None = None):
        self.buffered, self.log, self.open = buffered, log, {kind: set[Call]() for kind in MOST_OPEN}
        self.reads_s, self.writes_s, self._tasks = dict[Call, float](), dict[Call, float](), set[asyncio.Task[Any]]()

    async def watch(self, port: int) -> None:
        """Enforces the time limits, again and again. A timer for each call would cost more.

        Args:
          port: the number of the port.
        """
        limits = self.buffered.limits
        pause_s = min(_TICK_S, limits.body_s / 4, limits.idle_s / 4, limits.write_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            now_s = time.monotonic()
            try:
                for call in _late(self.reads_s, now_s):
                    call.expire()
                if late := _late(self.writes_s, now_s):
                    sockets.disconnect(port, {call.peer() for call in late})
                    for call in late:
                        self.writes_s[call] = now_s + limits.write_s
            except Exception as e:  # the limits hold for later calls
                foreign.log(_log, logging.ERROR, "the time limits of calls cannot be checked", error=e)

    def leave(self, call: "Call") -> None:
        """Gives the place of a call to others."""
        self.open[call.method.kind].discard(call)

    def end(self, call: "Call") -> None:
        """Forgets a call, whose client has taken the last answer or has gone."""
        self.leave(call)
        call.count(-call.held)
        call.ended = True
        self.reads_s.pop(call, None)
        self.writes_s.pop(call, None)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task, and keeps it until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Call:
    """A call in progress. For grpc, it is also the handler, whose function gets a stream of requests.

    grpc would wait without a limit for the request of a call that has only one.

    Args:
      method: its method.
      calls: the calls of the port.

    Attributes:
      context: grpc's context.
      held: its bytes in memory.
      ended: whether it is over.
      unanswered: how many messages have no answer yet. While there are some, the call is not idle.
    """

    __slots__ = (
        *("_began_s", "_calls", "_logged", "_metadata", "_received", "_sent", "_within_s"),
        *("context", "ended", "held", "method", "unanswered"),
    )
    request_deserializer = response_serializer = None

    def __init__(self, method: Method, calls: Calls):
        self.method, self._calls = method, calls
        self.context: Any = None
        self._began_s, self._within_s, self._received, self._sent, self.unanswered = time.monotonic(), 0.0, 0, 0, 0
        self._logged, self._metadata, self.held, self.ended = False, None, 0, False
        calls.open[method.kind].add(self)

    async def stream_unary(self, _: Any, context: Any) -> bytes | None:
        """What grpc calls. Errors become statuses."""
        self.context = context
        try:
            if not self.method.probe and not self.has_token():
                raise _without_token()
            made = await self.method.answer(self)
        except grpc.aio.AbortError:  # by `expire`
            raise
        except (asyncio.CancelledError, grpc.aio.BaseError):  # the client has gone
            self._log(failures.CLIENT_LEFT, "CANCELLED")
            raise
        except Exception as error:
            tells_names = failures.status_of(error) == 404 and not self.has_token()
            await self._fail(_without_token() if tells_names else error)
        else:
            self._sent += len(made or b"")
            self._log(200, "OK")
            self._writes()
            return made

    stream_stream = stream_unary

    def has_token(self) -> bool:
        """Whether the call has the token, or none is needed."""
        allows = self.method.allows
        return allows is None or allows(self._authorization())

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata that the client has sent."""
        if self._metadata is None:
            self._metadata = self.context.invocation_metadata()
        return self._metadata

    async def next(self, within_s: float) -> bytes | None:
        """The next message, or None at the end of them. If none comes within so many seconds, the call ends with an error."""
        ends_s = self._calls.reads_s
        self._within_s = within_s
        ends_s[self] = time.monotonic() + within_s
        try:
            # Nothing may cancel this, such as asyncio.timeout: grpc's core would still write to the memory of the operation.
            data = await self.context.read()
        finally:
            ends_s.pop(self, None)
        if not isinstance(data, bytes):  # it is grpc's sign of the end
            return None
        self._received += len(data)
        return data

    async def read(self, within_s: float) -> bytes:
        """The message of a call with one message. Raises RequestError if there is none."""
        data = await self.next(within_s)
        if data is None:
            raise RequestError("the call ended without a message; send one")
        return data

    async def read_small(self) -> bytes:
        """As `read`, for a message that is no inference."""
        return bodies.small(await self.read(SMALL_S))

    async def write(self, message: bytes) -> None:
        """Sends a response of a stream. If the client does not read it within `write_s` seconds, its connection ends."""
        self._writes()
        try:
            await self.context.write(message)
        finally:
            self._calls.writes_s.pop(self, None)
        self._sent += len(message)

    def hold(self, nbytes: int) -> None:
        """Counts bytes of a request, until the call ends or they are taken off. Raises RequestError if there is no room."""
        buffered = self._calls.buffered
        if buffered.nbytes + nbytes > buffered.limits.max_buffered_bytes:
            raise reader.no_room()
        self.count(nbytes)

    def count(self, nbytes: int) -> None:
        """Counts bytes in memory or, if the number is negative, takes them off. It asks for no room."""
        if not self.ended:
            self.held += nbytes
            self._calls.buffered.nbytes += nbytes

    def peer(self) -> tuple[str, int]:
        """Host and port of the client."""
        return _address(self.context.peer())

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task that may outlive the call for a moment."""
        return self._calls.start(work)

    def expire(self) -> None:
        """Ends the call, since no message has come in time."""
        if self.unanswered:
            self._calls.reads_s[self] = time.monotonic() + self._within_s
            return
        self._calls.reads_s.pop(self, None)
        error = RequestError(f"no message came within {self._within_s:g} s; send it at once", status=408)

        async def end() -> None:
            with contextlib.suppress(grpc.aio.BaseError):  # the client has gone, or it is the error that `abort` raises
                await self._fail(error)

        self._calls.start(end())

    async def _fail(self, error: BaseException) -> None:
        code, text = statuses.code_of(error), statuses.text_of(error)
        self._log(failures.status_of(error), code.name)
        self._calls.leave(self)  # the client might never take the status
        self._writes()
        await self.context.abort(code, text)

    def _writes(self) -> None:
        self._calls.writes_s[self] = time.monotonic() + self._calls.buffered.limits.write_s

    def _log(self, status: int, code: str) -> None:
        log = self._calls.log
        if log is None or self._logged:
            return
        self._logged = True
        trace = next((value for name, value in self.metadata() if name == "traceparent"), "")
        log.add_line(
            client=self.peer()[0],
            method="gRPC",
            path=self.method.path,
            status=status,
            received=self._received,
            sent=self._sent,
            seconds=time.monotonic() - self._began_s,
            trace=trace if isinstance(trace, bytes) else trace.encode(),
            grpc=code,
        )

    def _authorization(self) -> bytes | None:
        found = [value for name, value in self.metadata() if name == "authorization"]
        return found[0].encode() if len(found) == 1 and isinstance(found[0], str) else None


def _without_token() -> RequestError:
    return RequestError("the token is missing or wrong; send metadata authorization: Bearer TOKEN", status=401)


def _late(ends_s: Mapping[Call, float], now_s: float) -> list[Call]:
    return [call for call, end_s in ends_s.items() if end_s < now_s]


def _address(peer: str) -> tuple[str, int]:
    """Host and port in grpc's name of a client.

    >>> _address("ipv4:127.0.0.1:4711"), _address("ipv6:%5B::1%5D:4711")
    (('127.0.0.1', 4711), ('::1', 4711))
    """
    host, _, port = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]"), int(port or 0)  # grpc's name may be "unknown"
