"""Gathers queries of many requests for a moment, and brings them to one of several routers in one call. No Ray."""

import asyncio
import copy
import dataclasses
import itertools
import logging
import operator
import random
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from superserve_jax import errors
from superserve_jax.remote import packing
from superserve_jax.remote.calls import Answers, NotSentError, Part, RouterLostError, kept
from superserve_jax.remote.host import Failed
from superserve_jax.serving.futures import Reply
from superserve_jax.serving.options import as_array, check_floor, check_slo

_log = logging.getLogger(__name__)

_key = operator.attrgetter("key")
_GONE = (errors.WorkersLostError, errors.ServerClosedError)  # errors of a router that can answer nothing


class Cell(Protocol):
    """A cell's router, as its callers see it. `RemoteRouter` is one."""

    name: str

    async def infer(self, parts: Sequence[Part]) -> Answers:
        """Answers queries. Raises RouterLostError if the router is gone, and NotSentError. See `Router.infer`."""
        ...

    async def rest(self, ticket: str) -> Answers:
        """The answers that were not there yet. See `Router.rest`."""
        ...

    async def about(self) -> Any:
        """Answers if the router can serve. Raises an error otherwise."""
        ...


@dataclasses.dataclass(slots=True)
class _Request:
    """The queries of one call of `Collector.submit_many`. Requests with the same key can share a `Part`."""

    inputs: list[np.ndarray]
    files: bool
    key: tuple[Any, ...]
    slo_ms: float
    floor: float
    arrived_s: float
    answer: "asyncio.Future[list[Reply]]"
    found: dict[int, Reply | Exception] = dataclasses.field(default_factory=dict)

    def take(self, place: int, found: Reply | Exception, now_s: float) -> None:
        """Takes the answer to one of its queries, and answers the request after the last. Times count from its arrival."""
        self.found[place] = found
        if len(self.found) < len(self.inputs) or self.answer.done():
            return
        each = [self.found[i] for i in range(len(self.inputs))]
        if failed := next((one for one in each if isinstance(one, Exception)), None):
            self.answer.set_exception(failed)
            return
        latency_ms = 1e3 * (now_s - self.arrived_s)
        met_slo = latency_ms <= self.slo_ms
        self.answer.set_result(
            [
                reply._replace(met_slo=met_slo, latency_ms=latency_ms, queue_ms=max(0.0, latency_ms - reply.compute_ms))
                for reply in each
                if isinstance(reply, Reply)
            ]
        )


@dataclasses.dataclass(slots=True)
class _Line:
    """A router, and how many queries it has not answered."""

    router: Cell
    queries: int = 0
    lost: bool = False


class Collector:
    """Gathers queries and calls routers. One event loop uses it. It reads the clock itself, as uvloop's is coarse.

    Queries with the same SLO and floor share a call. It goes to the router with the fewest unanswered queries. If a router is
    lost, the clients of its queries get a RouterLostError. A router whose server has no workers, or cannot be opened, counts
    as lost, too. A lost router gets no more queries until it can serve again.

    Args:
      routers: the routers, one for each cell.
      slo_ms: the deadline of queries that have none of their own.
      wait_ms: how long the first query waits for others.
      most: so many queries are sent at once, without waiting.
      patience_s: if a router has not returned a call for so long, it is asked whether it is up. It is lost if it does not
        answer that within this time either.
      pause_s: how often a lost router is asked whether it is back.
    """

    def __init__(
        self,
        routers: Iterable[Cell],
        *,
        slo_ms: float = 36.0,
        wait_ms: float = 1.0,
        most: int = 64,
        patience_s: float = 40.0,
        pause_s: float = 1.0,
    ):
        self._lines = [_Line(router) for router in routers]
        if not self._lines:
            raise errors.ConfigError("a collector needs at least one router, got none")
        self._slo_ms, self._wait_s, self._most = check_slo(slo_ms), 1e-3 * wait_ms, most
        self._patience_s, self._pause_s = patience_s, pause_s
        self._waiting: list[_Request] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()

    async def submit(self, x: np.ndarray | bytes, *, slo_ms: float | None = None, min_accuracy: float = 0.0) -> Reply:
        """The reply to one query. See `submit_many`."""
        return (await self.submit_many([x], slo_ms=slo_ms, min_accuracy=min_accuracy))[0]

    async def submit_many(
        self, xs: Sequence[np.ndarray | bytes], *, slo_ms: float | None = None, min_accuracy: float = 0.0
    ) -> list[Reply]:
        """The replies to queries of one client. Their times, and their deadline, count from this call.

        Args:
          xs: the inputs, all of one dtype and, but for the first axis, one shape. Or the bytes of image files.
          slo_ms, min_accuracy: see `Server.submit`.

        Raises the first error of the queries, as `Server.submit` and its futures do, and RouterLostError. What no server
        takes, such as a masked array or an array of objects, is refused here with an InputError.
        """
        loop, files = asyncio.get_running_loop(), {isinstance(x, bytes) for x in xs}
        inputs = [np.frombuffer(x, np.uint8) if isinstance(x, bytes) else _plain(x) for x in xs]
        slo_ms, floor = self._slo_ms if slo_ms is None else check_slo(slo_ms), check_floor(min_accuracy)
        # The kinds of float8 share a `str`.
        keys = {(slo_ms, floor, *files, x.dtype.str, x.dtype.num, x.ndim, x.shape[1:]) for x in inputs}
        if len(keys) != 1 or len(files) != 1:
            raise errors.InputError(
                f"expected inputs of one kind: arrays of one dtype and shape, or image files; got {len(inputs)} inputs of "
                f"{max(len(keys), len(files))} kinds; submit each kind alone"
            )
        request = _Request(inputs, files.pop(), keys.pop(), slo_ms, floor, time.monotonic(), loop.create_future())
        self._waiting.append(request)
        self._count += len(xs)
        if self._count >= self._most:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._send)
        return await request.answer

    def lost(self) -> list[str]:
        """The names of the routers that are lost."""
        return [line.router.name for line in self._lines if line.lost]

    def lose(self, router: Cell) -> None:
        """Counts a router as lost: it gets no queries until it can serve."""
        self._lose(next(line for line in self._lines if line.router is router))

    async def close(self) -> None:
        """Waits for the answers to all queries."""
        self._send()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for task in self._asking:
            task.cancel()

    def _send(self) -> None:
        """Sends all that has been gathered."""
        if self._timer is not None:
            self._timer.cancel()
        gathered, self._waiting, self._count, self._timer = self._waiting, [], 0, None
        if live := [request for request in gathered if not request.answer.done()]:  # others were cancelled
            for _, group in itertools.groupby(sorted(live, key=_key), key=lambda request: request.key[:2]):
                kept(self._tasks, self._call(list(group)))  # SLO and floor: others may take much longer

    async def _call(self, requests: list[_Request]) -> None:
        """Answers requests, whatever happens. They are sorted by their keys."""
        try:
            await self._answer(requests)
        except Exception as error:
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(copy.copy(error))

    async def _answer(self, requests: list[_Request]) -> None:
        """Has a router answer the queries of all requests. Each request is answered as soon as its last query is."""
        now_s = time.monotonic()
        parts = [_part(list(group), now_s) for _, group in itertools.groupby(requests, key=_key)]
        line, waiting = self._best(), [(request, i) for request in requests for i in range(len(request.inputs))]
        line.queries += len(waiting)
        try:
            answers = await self._returned(line, line.router.infer(parts))
            while waiting := self._take(line, waiting, answers):
                answers = await self._returned(line, line.router.rest(answers.ticket))
        finally:
            line.queries -= len(waiting)

    def _take(self, line: _Line, waiting: "list[tuple[_Request, int]]", answers: Answers) -> "list[tuple[_Request, int]]":
        """Takes the answers to queries, and returns the queries without one."""
        found, now_s = answers.unpacked(), time.monotonic()
        late = [query for query, each in zip(waiting, found, strict=False) if each is None]
        if len(found) != len(waiting) or (late and not answers.ticket):
            count = sum(each is not None for each in found)
            raise errors.InferenceError(f"{line.router.name} gave {count} answers to {len(waiting)} queries")
        line.queries -= len(waiting) - len(late)
        for (request, i), each in zip(waiting, found, strict=True):
            if isinstance(each, Failed):
                error = each.exception()
                request.take(i, error, now_s)
                if isinstance(error, _GONE):
                    self._lose(line)
            elif each is not None:
                request.take(i, each, now_s)
        return late

    async def _returned(self, line: _Line, call: Awaitable[Answers]) -> Answers:
        """What a call returned. If it fails as a whole, though it was sent, the router can serve nothing."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([task], timeout=self._patience_s))[0]:
                await self._in_time(line, line.router.about())
            return await task
        except NotSentError:
            raise
        except Exception:  # what keeps a server from opening may have any class
            self._lose(line)
            raise
        finally:
            task.cancel()

    def _lose(self, line: _Line) -> None:
        if not line.lost:
            line.lost = True
            _log.warning("%s cannot serve; others get its queries until it can", line.router.name)
            kept(self._asking, self._ask(line))

    def _best(self) -> _Line:
        """A router that is up, and has the fewest unanswered queries."""
        if up := [line for line in self._lines if not line.lost]:
            return min(up, key=lambda line: (line.queries, random.random()))
        names = ", ".join(self.lost())
        raise RouterLostError(f"no router answers ({names}); start one of them again, and send the queries again")

    async def _in_time(self, line: _Line, call: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(call, self._patience_s)
        except TimeoutError:
            text = f"{line.router.name} has not answered within {self._patience_s:g} s; send the queries again"
            raise RouterLostError(text) from None

    async def _ask(self, line: _Line) -> None:
        """Asks a lost router until it answers."""
        while line.lost:
            await asyncio.sleep(self._pause_s)
            try:
                await self._in_time(line, line.router.about())
                line.lost = False
            except Exception as error:  # lost still, or its server cannot be opened
                _log.debug("%s is not back: %s", line.router.name, error)


def _plain(x: Any) -> np.ndarray:
    """An input that can be sent to a router, and packed with others of its dtype."""
    array = as_array(x)
    if array.dtype.hasobject or array.dtype.names:
        raise errors.InputError(
            f"an input of dtype {array.dtype}; expected numbers, as an array of one dtype, or the bytes of an image file"
        )
    return array


def _part(requests: list[_Request], now_s: float) -> Part:
    """The queries of requests with the same key. The earliest one sets the deadline of all."""
    first = requests[0]
    waited_ms = 1e3 * (now_s - min(request.arrived_s for request in requests))
    inputs = packing.pack([x for request in requests for x in request.inputs])
    return Part(inputs, first.slo_ms, waited_ms, first.floor, first.files)
