"""Takes calls from grpc's core: a loop for each method, and one for calls of unknown methods.

The loop of `grpc.aio.server` decodes the path of every call as UTF-8. A call whose path is not UTF-8 ends that loop, and with
it the port and all calls in progress. The loops here never read the path of an unknown method.

`grpc._cython.cygrpc` is not public. So grpcio's versions are limited in pyproject.toml, and tests/gateway/test_grpc_taking.py
shows whether a new version can be added.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from grpc._cython import cygrpc  # pyright: ignore[reportAttributeAccessIssue]

from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc.calls import MOST_OPEN, Call, Calls, Method


class Core(cygrpc.AioServer):
    """The server of grpc.aio, which takes calls by itself. Make it in a running event loop.

    Args:
      methods: the methods by path.
      calls: the calls in progress.
      options: options of grpc's core.
    """

    def __init__(self, methods: Mapping[str, Method], calls: Calls, options: Mapping[str, int]):
        self._methods, self._calls = methods, calls
        super().__init__(asyncio.get_running_loop(), None, (), None, tuple(options.items()), None)
        self.add_registered_method_handlers(dict.fromkeys(methods))

    def _make_request_call_future(self, path: bytes | None) -> asyncio.Task[None]:
        """What grpc's own loop waits for. It ends when the server does, by the exception that this loop expects."""
        return self._calls.start(self._take(path))

    async def _take(self, path: bytes | None) -> None:
        """Takes the calls with a path, or with any unknown one for None. Raises `cygrpc._RequestCallError` at the end."""
        loop, calls = asyncio.get_running_loop(), self._calls
        method = _UNKNOWN if path is None else self._methods[path.decode()]
        handle = cygrpc._handle_stream_stream_rpc if method.streams else cygrpc._handle_stream_unary_rpc  # noqa: SLF001
        taken, most = calls.open[method.kind], MOST_OPEN[method.kind]
        while True:
            state = await (self._request_call() if path is None else self._request_registered_call(path))
            call = Call(method if len(taken) < most else method._replace(answer=_too_many), calls)
            calls.start(self._run(call, handle(call, state, loop), state, loop))

    async def _run(self, call: Call, work: Coroutine[Any, Any, None], state: Any, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await cygrpc._schedule_rpc_coro(work, state, loop, call.method.path)  # noqa: SLF001
        finally:
            self._calls.end(call)


async def _unknown(_: Call) -> None:
    raise RequestError("there is no such method; docs/grpc.md lists them", status=501)


async def _too_many(_: Call) -> None:
    raise RequestError("too many calls are in progress; try again later", status=429)


_UNKNOWN = Method("", _unknown)
