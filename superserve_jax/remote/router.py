"""A router as an actor of Ray, and the calls to it, each of which brings many queries. Ray is imported late.

A call to an actor takes more than half a millisecond of CPU time on both sides. So processes that take requests gather queries
for a millisecond or two, and make one call for all of them, see `collector.py`.
"""

import asyncio
import contextlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from superserve_jax import errors
from superserve_jax.remote import actors, packing
from superserve_jax.remote.devices import ray_devices
from superserve_jax.remote.host import Failed
from superserve_jax.remote.packing import Packed
from superserve_jax.serving.futures import Future, Reply
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

_AT_ONCE = 10_000  # calls; each is a task of the actor's event loop, and no thread


class RouterLostError(errors.ServerClosedError):
    """The router that had the queries is gone or silent, or no router is left."""


class Part(NamedTuple):
    """Queries that share a deadline and a floor, so that one `Server.submit_many` takes them.

    Args:
      inputs: their inputs.
      left_ms: the time until their deadline.
      floor: the lowest accuracy that their clients accept.
      files: whether the inputs are the bytes of image files.
    """

    inputs: Packed
    left_ms: float
    floor: float = 0.0
    files: bool = False


class Answers(NamedTuple):
    """The answers to the queries of one call, in their order.

    Args:
      outputs: the outputs of the queries without an error, see `packing.pack_outputs`.
      replies: for each query its reply, without the output, or its error.
    """

    outputs: Any
    replies: list[Reply | Failed]

    @classmethod
    def of(cls, found: Sequence[Reply | Failed]) -> "Answers":
        """Packs answers."""
        outputs = [reply.output for reply in found if isinstance(reply, Reply)]
        return cls(
            packing.pack_outputs(outputs),
            [reply._replace(output=None) if isinstance(reply, Reply) else reply for reply in found],
        )

    def unpacked(self) -> list[Reply | Failed]:
        """The inverse of `of`."""
        outputs = iter(self.outputs)
        return [reply._replace(output=next(outputs)) if isinstance(reply, Reply) else reply for reply in self.replies]


class About(NamedTuple):
    """What those who call a router should know about its server.

    Args:
      input_shape, input_dtype: of one input.
      lengths: see `Engine`.
      max_queue: how many queries may wait.
      subnets: the subnets, in the order of the profile.
    """

    input_shape: tuple[int, ...]
    input_dtype: str
    lengths: tuple[int, ...]
    max_queue: int
    subnets: tuple[Subnet, ...]


class Router:
    """A server, and the calls of those who gather queries. All methods are coroutines, so no call holds a thread.

    Args:
      open_server: opens the server. It is called at the first use, and again if Ray has started the actor again.
    """

    def __init__(self, open_server: Callable[[], Server]):
        self._open_server = open_server
        self._opening: asyncio.Task[Server] | None = None

    async def about(self) -> About | Failed:
        """Opens the server, and tells about it."""
        try:
            server = await self._opened()
            inputs, pool = server.inputs, server.pool
            return About(inputs.shape, inputs.dtype.str, inputs.lengths, pool.backlog.most, tuple(pool.counters.ranks))
        except Exception as error:
            return Failed.of(error)

    async def infer(self, parts: Sequence[Part]) -> Answers | Failed:
        """Answers queries. An error of one query is among the answers, and an error of the server is the result."""
        try:
            server = await self._opened()
        except Exception as error:
            return Failed.of(error)
        futures = [future for part in parts for future in submit(server, part)]
        return Answers.of([future if isinstance(future, Failed) else await _reply(future) for future in futures])

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
        return server.submit_many(inputs, slo_ms=part.left_ms, min_accuracy=part.floor)
    except errors.SuperServeError:
        return [_submitted(server, x, part) for x in inputs]


def _submitted(server: Server, x: Any, part: Part) -> Future | Failed:
    try:
        return server.submit(x, slo_ms=part.left_ms, min_accuracy=part.floor)
    except errors.SuperServeError as error:
        return Failed.of(error)


async def _reply(future: Future) -> Reply | Failed:
    try:
        return await future
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

    def __init__(self, actor: Any, name: str = "the router"):
        self.actor, self.name = actor, name

    async def about(self) -> About:
        """See `Router.about`. Raises what opening the server raised, and RouterLostError."""
        return await self._result(self.actor.about)

    async def infer(self, parts: Sequence[Part]) -> Answers:
        """See `Router.infer`. Raises the error of the server, and RouterLostError."""
        return await self._result(self.actor.infer, parts)

    async def _result(self, method: Any, *arguments: Any) -> Any:
        from ray import exceptions

        try:
            found = await method.remote(*arguments)
        except exceptions.RayError as error:
            text = f"{self.name} is lost; send the queries again ({type(error).__name__}: {errors.one_line(error)})"
            raise RouterLostError(text) from error
        if isinstance(found, Failed):
            raise pickle.loads(found.error)
        return found


def start_router(open_server: Callable[[], Server], *, name: str = "", **options: Any) -> RemoteRouter:
    """Starts a router in an actor of Ray.

    Args:
      open_server: opens its server there, such as `functools.partial(open_cell, path, 8)`.
      name: with a name, the router outlives this process. If there is a router with this name already, it is taken.
      **options: options of the actor in Ray's own terms. Without others, it needs no CPU.

    Raises ConfigError as `ray_device`.
    """
    actor = actors.start(Router, open_server, options={"num_cpus": 0, **options}, name=name, at_once=_AT_ONCE)
    return RemoteRouter(actor, name or "the router")


def stop_router(name: str) -> None:
    """Ends the router with this name, if there is one, and the processes of its server that have no name."""
    import ray

    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(name, namespace=actors.NAMESPACE))
