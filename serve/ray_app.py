"""Serves an export by Ray Serve, from several routers side by side, called cells. Most users need `serve/gateway.py` instead.

    pip install 'superserve-jax[ray,serve]' 'ray[serve]'
    python serve/ray_app.py runs/demo/export --cells 2 --actors 2 --replicas 2
    serve run serve.ray_app:app export=runs/demo/export cells=2 actors=2 replicas=2

`serve run` is a command of Ray Serve: call it in the root of this repository. Serve sends each request to one of the
replicas. A replica decodes it, gathers queries for `wait_ms`, and calls a router once for all of them. Each router is an actor
with a server, whose workers are `actors` other actors. The routers are detached: they live on when a replica or Serve ends.
Ctrl-C ends the routers of the first command. This ends those of `serve run`:

    python serve/ray_app.py --stop --cells 2 --address auto

Do this also before you serve another export, since the replicas refuse routers that have opened something else.
It answers a part of what the gateway answers (docs/network.md): inference, metadata and readiness over HTTP, without texts,
compression, token, TLS and gRPC.
Library: remote.router, remote.collector, gateway.requests, gateway.replies.
"""

import asyncio
import dataclasses
import functools
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import tyro

from superserve_jax import cli, errors, remote
from superserve_jax.gateway import messages, replies, requests
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.messages import Answer
from superserve_jax.gateway.tensors import InputTensor
from superserve_jax.remote.calls import About
from superserve_jax.remote.router import RemoteRouter, description
from superserve_jax.serving.server import Server

_AT_ONCE = 1_000  # requests in a replica
_OF_THE_PROGRAM = ("port", "address", "stop")  # options that have no effect with `serve run`
_GRACE_S = 0.5  # how long a replica waits for other cells when one has opened its server


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export, at the same path on every host.
      cells: the number of routers.
      actors: the number of workers of each router.
      num_cpus: the CPUs that Ray reserves for each worker.
      num_gpus: the GPUs that Ray reserves for each worker.
      replicas: the number of processes that take requests.
      wait_ms: how long a replica gathers queries.
      most: so many queries are sent at once, without waiting.
      slo_ms: the deadline of requests that have none of their own.
      name: the name of the model, and the first part of the names of the routers.
      port: the port of Serve, if this program starts it.
      address: the cluster to join, such as "auto"; "local" starts one on this machine alone.
      stop: only end the routers.
    """

    export: Annotated[str, tyro.conf.Positional] = "digits"
    cells: int = 1
    actors: int = 1
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    replicas: int = 1
    wait_ms: float = 1.0
    most: int = 64
    slo_ms: float = 36.0
    name: str = "supernet"
    port: int = 8000
    address: str = "local"
    stop: bool = False

    def __post_init__(self):
        cli.check_above_zero(self, "cells", "actors", "replicas", "most", "slo_ms")
        errors.check_from_zero(self, "num_cpus", "num_gpus", "wait_ms")

    def open_server(self) -> Callable[[], Server]:
        """What opens the server of a router."""
        path = pathlib.Path(self.export)
        device = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        found = path.absolute() if path.exists() else self.export  # the actors may have another working directory
        return functools.partial(remote.open_cell, found, self.actors, device=device, slo_ms=self.slo_ms)


def names(options: Options) -> list[str]:
    """The names of the routers."""
    return [f"{options.name}-cell-{i}" for i in range(options.cells)]


def routers(options: Options, open_server: Callable[[], Server]) -> list[RemoteRouter]:
    """The routers of all cells. Those that are not there yet are started, on different hosts if possible."""
    return [remote.start_router(open_server, name=name, scheduling_strategy="SPREAD") for name in names(options)]


async def first_about(cells: Sequence[RemoteRouter]) -> list[About | None]:
    """What the cells say, as soon as one of them has opened its server. None for those that failed or take longer."""
    tasks = [asyncio.ensure_future(cell.about()) for cell in cells]
    waiting, error = set(tasks), None
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            error = next((task.exception() for task in done if task.exception()), error)
            if any(not task.exception() for task in done):
                if waiting:  # most of the others are as far
                    _, waiting = await asyncio.wait(waiting, timeout=_GRACE_S)
                return [None if task in waiting or task.exception() else task.result() for task in tasks]
    finally:
        for task in waiting:
            task.cancel()
    raise errors.ConfigError(f"no server could be opened: {errors.one_line(error)}")


class Ingress:
    """A replica of Serve: it takes requests, and calls the routers.

    Args:
      options: see above.
      open_server: opens the server of a router.
    """

    async def __init__(self, options: Options, open_server: Callable[[], Server]):
        self._name = options.name
        cells = routers(options, open_server)
        found = await first_about(cells)
        about = next(each for each in found if each is not None)
        wanted = description(open_server)
        if other := next((each.opened for each in found if each is not None and each.opened != wanted), None):
            stop = f"python serve/ray_app.py --stop --cells {options.cells} --name {options.name} --address auto"
            raise errors.ConfigError(f"the routers have opened {other}, and not {wanted}; run this first: {stop}")
        self._collector = remote.Collector(cells, slo_ms=options.slo_ms, wait_ms=options.wait_ms, most=options.most)
        for cell, each in zip(cells, found, strict=True):
            if each is None:
                self._collector.lose(cell)
        self._cells = len(cells)
        self._ranks = {subnet: rank for rank, subnet in enumerate(about.subnets)}
        dtype, any_length = np.dtype(about.input_dtype), bool(about.lengths)
        self._input = InputTensor(about.input_shape, dtype, any_length=any_length, most=about.max_queue)

    async def __call__(self, request: Any) -> Any:
        """Answers a request, which Serve gives as one of starlette. So is the answer."""
        from starlette.responses import Response  # pyright: ignore[reportMissingImports]

        try:
            answer = await self._answer(request.method, request.url.path, dict(request.headers.raw), await request.body())
        except Exception as error:
            answer = messages.failed(error)
        headers = {name.decode(): value.decode() for name, value in answer.headers}
        return Response(answer.body, answer.status, headers)

    async def _answer(self, method: str, path: str, headers: dict[bytes, bytes], body: bytes) -> Answer:
        model = f"/v2/models/{self._name}"
        if path == f"{model}/infer" and method == "POST":
            return await self._infer(headers, body)
        if method != "GET":
            raise RequestError(f"{method[:20]} is not possible for {path[:200]!r}; POST to {model}/infer", status=405)
        if path == "/v2/health/live":
            return _document({"live": True})
        if path in ("/v2/health/ready", f"{model}/ready"):
            if len(self._collector.lost()) == self._cells:
                raise remote.RouterLostError("no router answers")
            return _document({"ready": True})
        if path == model:
            tensor = {"name": "input", "datatype": self._input.datatype, "shape": [-1, *self._input.dims]}
            return _document({"name": self._name, "versions": ["1"], "platform": "superserve_jax", "inputs": [tensor]})
        raise RequestError(f"there is no path {path[:200]!r}; POST to {model}/infer", status=404)

    async def _infer(self, headers: dict[bytes, bytes], body: bytes) -> Answer:
        if b"content-encoding" in headers:
            raise RequestError("Content-Encoding is not supported here; send the body as it is", status=415)
        wanted = requests.read(body, requests.json_length(headers), self._input)
        slo_ms = requests.slo_of(headers) if wanted.slo_ms is None else wanted.slo_ms
        rows: list[Any] = list(wanted.rows)
        made = await self._collector.submit_many(rows, slo_ms=slo_ms, min_accuracy=wanted.min_accuracy)
        content, json_length = replies.write(self._name, wanted, made, self._ranks)
        if json_length is None:
            return Answer(content)
        length = (b"inference-header-content-length", b"%d" % json_length)
        return Answer(content, 200, ((b"content-type", b"application/octet-stream"), length))


def _document(value: Any) -> Answer:
    return Answer(msgspec.json.encode(value))


def bound(options: Options, open_server: Callable[[], Server]) -> Any:
    """The application for Serve, with routers that open other servers than those of an export."""
    from ray import serve  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    deployment = serve.deployment(  # pyright: ignore[reportAttributeAccessIssue]
        Ingress, num_replicas=options.replicas, max_ongoing_requests=_AT_ONCE
    )
    return deployment.bind(options, open_server)


def app(arguments: dict[str, str]) -> Any:
    """What `serve run` builds, from arguments such as cells=2. Raises UnknownNameError and ConfigError for wrong ones."""
    known = [field.name for field in dataclasses.fields(Options) if field.name not in _OF_THE_PROGRAM]
    for name in arguments:
        errors.check_name("argument of the app", name, known)
    with errors.refusing(errors.ConfigError, "an argument of the app is not possible"):
        options = msgspec.convert(arguments, Options, strict=False)
    return bound(options, options.open_server())


def run(options: Options, application: Any) -> None:
    """Serves an application of `bound` until SIGTERM or Ctrl-C."""
    from ray import serve  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set handlers, too
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(application, name=options.name, route_prefix="/")  # pyright: ignore[reportAttributeAccessIssue]
    print(msgspec.json.encode({"port": options.port}).decode(), flush=True)
    stopped.wait()
    # Not `shutdown`: it would end what others serve in this cluster.
    serve.delete(options.name)  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address=options.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if not options.stop:
            run(options, bound(options, options.open_server()))
    finally:
        for name in names(options):
            remote.stop_router(name)
        ray.shutdown()


if __name__ == "__main__":
    cli.run(main)
