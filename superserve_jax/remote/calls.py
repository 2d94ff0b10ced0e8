"""What a call to a router carries: queries and answers, each as few arrays. No Ray."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

from superserve_jax import errors
from superserve_jax.remote import packing
from superserve_jax.remote.host import Failed
from superserve_jax.remote.packing import Packed
from superserve_jax.serving.futures import Reply
from superserve_jax.subnet import Subnet


class RouterLostError(errors.ServerClosedError):
    """The router that had the queries is gone or silent, or no router is left."""


class NotSentError(errors.InputError):
    """Queries cannot be sent to a router: it has not seen them, and says nothing about itself."""


class Part(NamedTuple):
    """Queries that share a deadline and a floor, so that one `Server.submit_many` takes them.

    Args:
      inputs: their inputs.
      slo_ms: the time from their arrival until their deadline.
      waited_ms: how long ago the first of them arrived.
      floor: the lowest accuracy that their clients accept.
      files: whether the inputs are the bytes of image files.
    """

    inputs: Packed
    slo_ms: float
    waited_ms: float = 0.0
    floor: float = 0.0
    files: bool = False


class Answers(NamedTuple):
    """The answers to the queries of one call, in their order.

    Args:
      outputs: the outputs of the queries without an error, see `packing.pack_outputs`.
      replies: for each query its reply, without the output, or its error. None if it has no answer yet.
      ticket: names the queries without an answer, see `Router.rest`. Empty if there are none.
    """

    outputs: Any
    replies: list[Reply | Failed | None]
    ticket: str = ""

    @classmethod
    def of(cls, found: Sequence[Reply | Failed | None], ticket: str = "") -> "Answers":
        """Packs answers."""
        outputs = [reply.output for reply in found if isinstance(reply, Reply)]
        return cls(
            packing.pack_outputs(outputs),
            [reply._replace(output=None) if isinstance(reply, Reply) else reply for reply in found],
            ticket,
        )

    def unpacked(self) -> list[Reply | Failed | None]:
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
      opened: what the router has opened, see `router.description`.
    """

    input_shape: tuple[int, ...]
    input_dtype: str
    lengths: tuple[int, ...]
    max_queue: int
    subnets: tuple[Subnet, ...]
    opened: str = ""


def kept(tasks: "set[asyncio.Task[Any]]", work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Starts a task, and keeps it among `tasks` until it ends, since the loop itself holds tasks weakly."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
