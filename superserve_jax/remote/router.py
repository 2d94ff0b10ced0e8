"""A router as an actor of Ray, and the calls to it, each of which brings many queries. Ray is imported late.

A call to an actor takes more than half a millisecond of CPU time on both sides. So processes that take requests gather
queries for a millisecond or two, and make one call for all of them, see `collector.py`.

A call does not wait for its slowest query. After 3/4 of the time left, it returns the answers so far and a
ticket. Only a caller with late queries makes a second call with the ticket, for the rest.
"""

import asyncio
import dataclasses
import re
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.remote import actors, packing
from superserve_jax.remote.calls import About, Answers, NotSentError, Part, RouterLostError, kept
from superserve_jax.remote.devices import ray_devices
from superserve_jax.remote.host import Failed
from superserve_jax.serving.futures import Future, Reply
from superserve_jax.serving.server import Server

_AT_ONCE = 10_000  # calls; each is a task of the actor's event loop, and no thread
_SHARE = 0.75  # of the time until the deadline: when a call returns what it has. The rest is for the way back.
_GRACE_S = 5e-3  # how long a call waits at least, and how long answers wait for others that are late, too
_POLL_S = 5.0  # how long a call waits at most
_FORGET_S = 60.0  # a ticket that nobody has used for so long is forgotten


def description(open_server: object) -> str:
    """What opens a server, as a text that is the same in all processes.

    >>> import functools
    >>> description(functools.partial(sorted, (2, 1), reverse=True))
    'functools.partial(<built-in function sorted>, (2, 1), reverse=True)'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(open_server))


@dataclasses.dataclass(slots=True)
class _Rest:
    """Queries that are not answered yet, the tasks that wait for them, and when they are forgotten."""

    tasks: "dict[Future, asyncio.Task[Any]]"
    forgetting: asyncio.TimerHandle


class Router:
    """A server, and the calls of those who gather queries. All methods are coroutines, so no call holds a thread.

    Args:
      open_server: opens the server. It is called at the first use, and again if Ray has started the actor again.
    """

    def __init__(self, open_server: Callable[[], Server]):
        self._open_server = open_server
        self._opening: asyncio.Task[Server] | None = None
        self._rests: dict[str, _Rest] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def about(self) -> About | Failed:
        """Opens the server, and tells about it. It is an error if the server has no live worker."""
        try:
            server = await self._opened()
            if not server.health()["alive"]:
                raise errors.WorkersLostError("no worker of this router's server is alive; send queries to another one")
            inputs, pool = server.inputs, server.pool
            shape, dtype, ranks = inputs.shape, inputs.dtype.str, tuple(pool.counters.ranks)
            return About(shape, dtype, inputs.lengths, pool.backlog.most, ranks, description(self._open_server))
        except Exception as error:
            return Failed.of(error)

    async def infer(self, parts: Sequence[Part]) -> Answers | Failed:
        """Answers queries. An error of one query is among the answers, and an error of the server is the result.

        If some take too long, the result has no answers to them, but a ticket for `rest`.
        """
        try:
            server = await self._opened()
        except Exception as error:
            return Failed.of(error)
        futures = [future for part in parts for future in submit(server, part)]
        left_s = 1e-3 * max((part.slo_ms - part.waited_ms for part in parts), default=0.0)
        late = [future for future in futures if isinstance(future, Future)]
        await asyncio.wait([self._task(_all(late))], timeout=min(max(_SHARE * left_s, _GRACE_S), _POLL_S))
        return self._found(futures, {})

    async def rest(self, ticket: str) -> Answers | Failed:
        """The answers to the queries without one in an earlier result, in their order. It waits until some are there.

        It may give no answers to some of them, and a new ticket.
        """
        rest = self._rests.pop(ticket, None)
        if rest is None:
            text = f"ticket {ticket} is not known: it was used before, or not for {_FORGET_S:g} s; send the queries again"
            return Failed.of(RouterLostError(text))
        rest.forgetting.cancel()
        tasks = rest.tasks.values()
        await asyncio.wait(tasks, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(tasks, timeout=_GRACE_S)
        return self._found([*rest.tasks], rest.tasks)

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that waits for queries. It is never cancelled, since that would cancel the queries."""
        return kept(self._tasks, work)

    def _found(self, futures: "Sequence[Future | Failed]", tasks: "dict[Future, asyncio.Task[Any]]") -> Answers:
        """The answers so far, with a ticket for the others. Some have tasks already that wait for them."""
        found = [future if isinstance(future, Failed) else _now(future) for future in futures]
        late = [future for future, each in zip(futures, found, strict=True) if each is None and isinstance(future, Future)]
        if not late:
            return Answers.of(found)
        ticket = uuid.uuid4().hex  # no number, which another ticket would have after Ray has started the actor again
        forgetting = asyncio.get_running_loop().call_later(_FORGET_S, self._forget, ticket)
        waits = {future: tasks.get(future) or self._task(_reply(future)) for future in late}
        self._rests[ticket] = _Rest(waits, forgetting)
        return Answers.of(found, ticket)

    def _forget(self, ticket: str) -> None:
        for future in self._rests.pop(ticket).tasks:
            future.cancel()  # nobody wants the answer

    async def _opened(self) -> Server:
        opening = self._opening
        if opening is None:
            opening = self._opening = asyncio.create_task(asyncio.to_thread(self._open_server))
        try:
            return await asyncio.shield(opening)
        except Exception:
            if self._opening is opening:
                self._opening = None  # the next call tries again
            raise


def submit(server: Server, part: Part) -> "Sequence[Future | Failed]":
    """Submits queries at once, or each alone if one of them is refused. A refused query is an error in the result."""
    inputs = packing.unpack(part.inputs)
    if part.files:
        inputs = [x.tobytes() for x in inputs]
    try:
        return _admitted(server, inputs, part)
    except errors.SuperServeError:
        return [_submitted(server, x, part) for x in inputs]


def _submitted(server: Server, x: Any, part: Part) -> Future | Failed:
    try:
        return _admitted(server, [x], part)[0]
    except errors.SuperServeError as error:
        return Failed.of(error)


def _admitted(server: Server, inputs: Sequence[Any], part: Part) -> list[Future]:
    """Submits queries with their own SLO. With the time left instead, a late query would look like a very short SLO."""
    return server._admit(inputs, part.slo_ms, part.floor, 1e-3 * part.waited_ms)  # noqa: SLF001


async def _all(futures: Sequence[Future]) -> None:
    """Waits for all queries. No task for each, since most calls need nothing else."""
    for future in futures:
        await _reply(future)


async def _reply(future: Future) -> Reply | Failed:
    try:
        return await future
    except Exception as error:
        return Failed.of(error)


def _now(future: Future) -> Reply | Failed | None:
    """The answer to a query, if there is one."""
    if not future.done():
        return None
    try:
        return future.result()
    except Exception as error:
        return Failed.of(error)


def open_cell(path: Any, count: int, *, name: str = "", device: Mapping[str, Any] | None = None, **options: Any) -> Server:
    """Opens the server of a router: an export on so many processes of Ray.

    Args:
      path: the export, see `Server`.
      count: the number of processes.
      name: with a name, the processes outlive the router, see `ray_devices`.
      device: options of the processes, see `ray_devices`.
      **options: options of the server.
    """
    return Server(path, devices=ray_devices(count, name=name, **(device or {})), **options)


class RemoteRouter:
    """A router in an actor. It is what a `Collector` calls. See `start_router`."""

    def __init__(self, actor: Any, name: str = ""):
        self.actor, self.name, self._registered = actor, name or "the router", name

    async def about(self) -> About:
        """See `Router.about`. Raises what opening the server raised, and RouterLostError."""
        return await self._result("about")

    async def infer(self, parts: Sequence[Part]) -> Answers:
        """See `Router.infer`. Raises the error of the server, RouterLostError, and NotSentError."""
        return await self._result("infer", parts)

    async def rest(self, ticket: str) -> Answers:
        """See `Router.rest`. Raises RouterLostError."""
        return await self._result("rest", ticket)

    async def _result(self, method: str, *arguments: Any) -> Any:
        from ray import exceptions

        try:
            found = await self._sent(method, *arguments)
        except exceptions.RayError as error:
            if self._registered and isinstance(error, exceptions.ActorDiedError):  # another one may have its name
                self.actor = await asyncio.to_thread(actors.find, Router, self._registered) or self.actor
            text = f"{self.name} is lost; send the queries again ({type(error).__name__}: {errors.one_line(error)})"
            raise RouterLostError(text) from error
        if isinstance(found, Failed):
            raise found.exception()
        return found

    def _sent(self, method: str, *arguments: Any) -> Any:
        from ray import exceptions

        try:
            return getattr(self.actor, method).remote(*arguments)
        except exceptions.RayError:
            raise
        except Exception as error:  # pickling raises what it likes
            text = f"the queries cannot be sent to {self.name} ({type(error).__name__}: {errors.one_line(error)[:300]})"
            raise NotSentError(f"{text}; send arrays of numbers, or image files") from error


def start_router(open_server: Callable[[], Server], *, name: str = "", **options: Any) -> RemoteRouter:
    """Starts a router in an actor of Ray.

    Args:
      open_server: opens its server there, such as `functools.partial(open_cell, path, 8)`.
      name: with a name, the router outlives this process. If there is a router with this name already, it is taken. A device
        may have the same name.
      **options: options of the actor in Ray's own terms. Without others, it needs no CPU.

    Raises ConfigError as `ray_device`.
    """
    actor = actors.start(Router, open_server, options={"num_cpus": 0, **options}, name=name, at_once=_AT_ONCE)
    return RemoteRouter(actor, name)


def stop_router(name: str) -> None:
    """Ends the router with this name, if there is one, and the processes of its server that have no name."""
    import ray

    if (actor := actors.find(Router, name)) is not None:
        ray.kill(actor)
