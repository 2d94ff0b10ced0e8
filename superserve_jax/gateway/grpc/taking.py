"""Takes calls from grpc's core: a loop for each method, and one for calls of unknown methods.

The loop of `grpc.aio.server` decodes the path of every call as UTF-8. A call whose path is not UTF-8 ends that loop, and with it
the port and all calls in progress. The loops here never read the path of an unknown method.

`grpc._cython.cygrpc` is not public. So grpcio's versions are limited in pyproject.toml, and tests/gateway/test_grpc_taking.py
shows whether a new version can be added.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
from grpc._cython import cygrpc  # pyright: ignore[reportAttributeAccessIssue]


class Core(cygrpc.AioServer):
    """The server of grpc.aio, which takes calls by itself. Make it in a running event loop.

    Args:
      methods: the handler of each method by its path, such as "/inference.GRPCInferenceService/ModelInfer".
      most: how many calls may be in progress. Further ones get status RESOURCE_EXHAUSTED.
      options: options of grpc's core.
    """

    def __init__(self, methods: Mapping[str, grpc.RpcMethodHandler], most: int, options: Mapping[str, int]):
        self.methods, self._most = methods, most
        self._calls = set[asyncio.Task[None]]()
        super().__init__(asyncio.get_running_loop(), None, (), None, tuple(options.items()), None)
        self.add_registered_method_handlers(dict(methods))

    def resolve_handler(self, call: Any) -> grpc.RpcMethodHandler | None:
        """Tells `cygrpc._handle_rpc` the handler of a call; None makes it answer UNIMPLEMENTED."""
        return self.methods.get(call.method)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[None]:
        """What grpc's own loop waits for. It ends when the server does, by the exception that this loop expects."""
        loop = asyncio.get_running_loop()
        return loop.create_task(self._take(method))

    async def _take(self, method: bytes | None) -> None:
        """Takes the calls of a method, or those of unknown methods for None. Raises `cygrpc._RequestCallError` at the end."""
        loop = asyncio.get_running_loop()
        name = "" if method is None else method.decode()
        calls = self._calls
        while True:
            call = await (self._request_call() if method is None else self._request_registered_call(method))
            made = cygrpc._handle_rpc(name, self, (), call, loop, len(calls) >= self._most)  # noqa: SLF001 - see above
            task = loop.create_task(cygrpc._schedule_rpc_coro(made, call, loop, name))  # noqa: SLF001
            calls.add(task)
            task.add_done_callback(calls.discard)
