"""Gathers queries of many requests for a moment, and brings them to one of several routers in one call. No Ray."""

import asyncio
import copy
import dataclasses
import itertools
import logging
import operator
import pickle
import random
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from superserve_jax import errors
from superserve_jax.remote import packing
from superserve_jax.remote.host import Failed
from superserve_jax.remote.router import Answers, Part, RouterLostError
from superserve_jax.serving.futures import Reply
from superserve_jax.serving.options import check_slo

_log = logging.getLogger(__name__)

_key = operator.attrgetter("key")
_LEAST_MS = 1e-3  # left for a query whose deadline has passed: it is answered late


class Cell(Protocol):
    """A cell's router, as its callers see it. `RemoteRouter` is one."""

    name: str

    async def infer(self, parts: Sequence[Part]) -> Answers:
        """Answers queries. Raises RouterLostError if the router is gone."""
        ...

    async def about(self) -> Any:
        """Answers if the router is up. Raises RouterLostError otherwise."""
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

    def resolve(self, found: Sequence[Reply | Failed], now_s: float) -> None:
        """Answers the request. Times count from its arrival."""
        if self.answer.done():
            return
        if failed := next((each for each in found if isinstance(each, Failed)), None):
            self.answer.set_exception(pickle.loads(failed.error))
            return
        latency_ms = 1e3 * (now_s - self.arrived_s)
        met_slo = latency_ms <= self.slo_ms
        self.answer.set_result(
            [
                reply._replace(met_slo=met_slo, latency_ms=latency_ms, queue_ms=max(0.0, latency_ms - reply.compute_ms))
                for reply in found
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

    A call goes to the router with the fewest unanswered queries. If a router is lost, the clients of its queries get a
    RouterLostError. It gets no more queries until it answers again.

    Args:
      routers: the routers, one for each cell.
      slo_ms: the deadline of queries that have none of their own.
      wait_ms: how long the first query waits for others.
      most: so many queries are sent at once, without waiting.
      patience_s: after so long without an answer, a router counts as lost. A server without workers waits for half a minute.
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
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
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

        Raises the first error of the queries, as `Server.submit` and its futures do, and RouterLostError.
        """
        loop, files = asyncio.get_running_loop(), {isinstance(x, bytes) for x in xs}
        inputs = [np.frombuffer(x, np.uint8) if isinstance(x, bytes) else np.asarray(x) for x in xs]
        slo_ms, floor = self._slo_ms if slo_ms is None else check_slo(slo_ms), float(min_accuracy)
        keys = {(slo_ms, floor, *files, x.dtype.str, x.ndim, x.shape[1:]) for x in inputs}
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
            self._spawn(self._tasks, self._call(sorted(live, key=_key)))

    @staticmethod
    def _spawn(tasks: "set[asyncio.Task[None]]", work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _call(self, requests: list[_Request]) -> None:
        """Answers requests, whatever happens. They are sorted by their keys."""
        try:
            found = await self._found(requests)
        except Exception as error:
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(copy.copy(error))
            return
        each, now_s = iter(found), time.monotonic()
        for request in requests:
            request.resolve(list(itertools.islice(each, len(request.inputs))), now_s)

    async def _found(self, requests: list[_Request]) -> list[Reply | Failed]:
        """The answers of a router to the queries of all requests."""
        now_s, count = time.monotonic(), sum(len(request.inputs) for request in requests)
        parts = [_part(list(group), now_s) for _, group in itertools.groupby(requests, key=_key)]
        line = self._best()
        line.queries += count
        try:
            found = (await self._in_time(line, line.router.infer(parts))).unpacked()
        except RouterLostError:
            if not line.lost:
                line.lost = True
                _log.warning("%s is lost; its queries fail, and others go elsewhere", line.router.name)
                self._spawn(self._asking, self._ask(line))
            raise
        finally:
            line.queries -= count
        if len(found) != count:
            raise errors.InferenceError(f"{line.router.name} gave {len(found)} answers to {count} queries")
        return found

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


def _part(requests: list[_Request], now_s: float) -> Part:
    """The queries of requests with the same key. The earliest one sets the deadline of all."""
    first = requests[0]
    left_ms = first.slo_ms - 1e3 * (now_s - min(request.arrived_s for request in requests))
    inputs = packing.pack([x for request in requests for x in request.inputs])
    return Part(inputs, max(_LEAST_MS, left_ms), first.floor, first.files)
