"""Calls of gRPC as this package writes them: functions of messages. Their errors become statuses as over HTTP."""

import asyncio
import logging
from collections.abc import Callable, Container, Mapping
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError

from superserve_jax.gateway import failures
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import messages

_FROM_CLIENTS = ("ExecuteBatchError", "Invalid encoding on")
# grpc logs a traceback for each answer whose client has gone, and for metadata that are not UTF-8. Clients could fill the log.
logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: not str(record.msg).startswith(_FROM_CLIENTS))

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
SMALL_S = 10.0
"""How long a small message may take."""
_MOST_TEXT = 1000  # characters of an error; clients refuse metadata of more than 8 KiB


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status of gRPC for an error. It follows from the status of HTTP.

    >>> code_of(RequestError("wrong")), code_of(ValueError("why"))
    (<StatusCode.INVALID_ARGUMENT: (3, 'invalid argument')>, <StatusCode.INTERNAL: (13, 'internal')>)
    """
    return _CODES.get(failures.status_of(error), grpc.StatusCode.INTERNAL)


def text_of(error: BaseException) -> str:
    """What the client reads about an error."""
    return failures.message_of(error)[:_MOST_TEXT]


def parsed(kind: Any, data: bytes) -> Any:
    """The message in `data`. Raises RequestError if there is none.

    Args:
      kind: the class of the message.
      data: the serialized message.
    """
    try:
        return kind.FromString(data)
    except DecodeError as e:
        raise RequestError(f"the data is no {kind.DESCRIPTOR.full_name} in the format of protobuf; send one") from e


Allows = Callable[[bytes | None], bool]
"""Whether a call with this `authorization` in its metadata may be answered."""


def handlers(
    service: str, calls: Mapping[str, Callable[..., Any]], allows: Allows | None = None, probes: Container[str] = ()
) -> dict[str, grpc.RpcMethodHandler]:
    """What `taking.Core` needs to answer the calls of a service: a handler for the path of each call.

    Args:
      service: the name of the service, such as "grpc.health.v1.Health".
      calls: the function of each call by name. Calls that are not among them get status UNIMPLEMENTED.
      allows: whether a call is allowed; None allows all.
      probes: the calls that are always allowed.

    A function gets the message, and returns the fields of the response as plain values. A coroutine function gets grpc's
    context. It reads messages with `read` or `context.read`. It returns the bytes of the response, or writes several with
    `context.write`.

    grpc sees a stream of requests in every call. For a call with one request, it would wait for that without a limit.
    """
    made = dict[str, grpc.RpcMethodHandler]()
    for name, call in calls.items():
        method = messages.POOL.FindMethodByName(f"{service}.{name}")
        request, response = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        answer = call if asyncio.iscoroutinefunction(call) else _document(call, request, response)
        streams = method.server_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        made[f"/{service}/{name}"] = make(_reporting(answer, None if name in probes else allows))
    return made


async def read(context: Any, within_s: float) -> bytes:
    """The next message of a call. Raises RequestError if there is none, or if it takes longer than `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            data = await context.read()
    except TimeoutError:
        raise RequestError(f"no message came within {within_s:g} s; send it at once", status=408) from None
    if not isinstance(data, bytes):  # it is grpc's sign of the end
        raise RequestError("the call ended without a message; send one")
    return data


def _document(call: Callable[[Any], dict[str, Any]], request: Any, response: Any) -> Callable[..., Any]:
    async def answer(context: Any) -> bytes:
        message = parsed(request, await read(context, SMALL_S))
        return json_format.ParseDict(call(message), response()).SerializeToString()

    return answer


def _reporting(call: Callable[..., Any], allows: Allows | None) -> Callable[..., Any]:
    """The call, with its errors as statuses."""

    async def handle(_: Any, context: Any) -> Any:
        try:
            if allows is not None and not allows(_authorization(context)):
                raise RequestError("the token is missing or wrong; send metadata authorization: Bearer TOKEN", status=401)
            return await call(context)
        except Exception as error:
            await context.abort(code_of(error), text_of(error))

    return handle


def _authorization(context: Any) -> bytes | None:
    found = [value for name, value in context.invocation_metadata() if name == "authorization"]
    return found[0].encode() if len(found) == 1 else None
