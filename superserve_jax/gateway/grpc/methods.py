"""Makes methods of gRPC from functions of messages. No sockets."""

import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any

from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError

from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import calls, messages
from superserve_jax.gateway.grpc.calls import Call, Method


def of_service(
    service: str,
    answers: Mapping[str, Callable[..., Any]],
    allows: calls.Allows | None = None,
    *,
    probes: Container[str] = (),
    kinds: Mapping[str, str] | None = None,
) -> dict[str, Method]:
    """The methods of a service by path.

    Args:
      service: the name of the service, such as "grpc.health.v1.Health".
      answers: the function of each method by name. Methods that are not among them get status UNIMPLEMENTED.
      allows: whether a call has the token; None allows all.
      probes: the methods that need no token, see `Method.probe`.
      kinds: the kind of each method that is not short, see `Method.kind`.

    A function gets the message, and returns the fields of the response as plain values. A coroutine function gets the `Call`,
    as `Method.answer` does.
    """
    made = dict[str, Method]()
    for name, function in answers.items():
        method = messages.POOL.FindMethodByName(f"{service}.{name}")
        request, response = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        answer = function if inspect.iscoroutinefunction(function) else _document(function, request, response)
        path = f"/{service}/{name}"
        made[path] = Method(path, answer, method.server_streaming, allows, name in probes, (kinds or {}).get(name, "short"))
    return made


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


def _document(call: Callable[[Any], dict[str, Any]], request: Any, response: Any) -> Callable[[Call], Any]:
    async def answer(made: Call) -> bytes:
        message = parsed(request, await made.read_small())
        return json_format.ParseDict(call(message), response()).SerializeToString()

    return answer
