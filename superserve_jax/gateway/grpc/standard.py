"""Services that every server of gRPC has: grpc.health.v1.Health, which load balancers ask, and grpc.reflection.

With reflection, programs such as grpcurl need no .proto files. The packages grpcio-health-checking and grpcio-reflection would
put their messages into protobuf's default pool, and know no model that becomes ready by itself.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc

from superserve_jax.gateway import bodies
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import calls, messages, methods, service
from superserve_jax.gateway.grpc.calls import Call, Method
from superserve_jax.gateway.grpc.service import Service
from superserve_jax.gateway.model import ServedModel

_WATCH_S = 0.5
"""How often a watched status is looked at."""
_ALL = "", service.NAME  # they mean all models
_Request, _Response = (messages.named(f"grpc.health.v1.HealthCheck{kind}") for kind in ("Request", "Response"))
_ListRequest, _ListResponse = (messages.named(f"grpc.health.v1.HealthList{kind}") for kind in ("Request", "Response"))


class Health:
    """The service grpc.health.v1.Health. It knows "" and the inference service, which mean all models, and each model's name.

    Args:
      inference: the service whose models it tells about.
      models: the models by name, which may come and go.
    """

    def __init__(self, inference: Service, models: Mapping[str, ServedModel]):
        self._inference, self._models = inference, models

    def methods(self, allows: calls.Allows | None = None) -> dict[str, Method]:
        """The methods Check, List and Watch. `allows`: see `methods.of_service`. Without the token, List tells no names."""
        made = {"Check": self._check, "List": self._list, "Watch": self._watch}
        return methods.of_service("grpc.health.v1.Health", made, allows, probes=made, kinds={"Watch": "standing"})

    def _status(self, name: str) -> str:
        if name not in self._names():
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._inference.is_ready(None if name in _ALL else name) else "NOT_SERVING"

    def _names(self) -> list[str]:
        return [*self._models, *_ALL]

    def _check(self, message: Any) -> dict[str, Any]:
        if message.service not in self._names():
            raise self._unknown(message.service)
        return {"status": self._status(message.service)}

    async def _list(self, call: Call) -> bytes:
        methods.parsed(_ListRequest, await call.read_small())
        statuses = {name: _Response(status=self._status(name)) for name in (self._names() if call.has_token() else ("",))}
        return _ListResponse(statuses=statuses).SerializeToString()

    def _unknown(self, name: str) -> RequestError:
        known = ", ".join(repr(name) for name in self._names())
        return RequestError(f"unknown service '{name[:100]}'; known: {known}", status=404)

    async def _watch(self, call: Call) -> None:
        name, told = methods.parsed(_Request, await call.read_small()).service, None
        if name not in self._names() and not call.has_token():
            raise self._unknown(name)
        while True:
            status = self._status(name)
            if status != told:
                await call.write(_Response(status=status).SerializeToString())
                told = status
            await asyncio.sleep(_WATCH_S)


def reflection(version: str, idle_s: float, allows: calls.Allows | None = None) -> dict[str, Method]:
    """The service grpc.reflection, version "v1" or "v1alpha". The two differ in their name only.

    A stream without a request for `idle_s` seconds ends. For `allows`, see `methods.of_service`.
    """
    package = f"grpc.reflection.{version}"
    request = messages.named(f"{package}.ServerReflectionRequest")
    response = messages.named(f"{package}.ServerReflectionResponse")
    names = [service.NAME, "grpc.health.v1.Health", f"{package}.ServerReflection"]

    async def info(call: Call) -> None:
        while (data := await call.next(idle_s)) is not None:
            asked = methods.parsed(request, bodies.small(data))
            answer = response(valid_host=asked.host, original_request=asked)
            try:
                if asked.WhichOneof("message_request") == "list_services":
                    for name in names:
                        answer.list_services_response.service.add(name=name)
                else:
                    answer.file_descriptor_response.file_descriptor_proto.extend(_files(asked))
            except KeyError:
                answer.error_response.error_code = grpc.StatusCode.NOT_FOUND.value[0]
                answer.error_response.error_message = "no such file, symbol or extension"
            await call.write(answer.SerializeToString())

    return methods.of_service(
        f"{package}.ServerReflection", {"ServerReflectionInfo": info}, allows, kinds={"ServerReflectionInfo": "standing"}
    )


def _files(asked: Any) -> list[bytes]:
    """The requested definition, and those that it imports. Raises KeyError if there is none."""
    kind = asked.WhichOneof("message_request")
    if kind == "file_by_filename":
        wanted = messages.POOL.FindFileByName(asked.file_by_filename)
    elif kind == "file_containing_symbol":
        wanted = messages.POOL.FindFileContainingSymbol(asked.file_containing_symbol)
    else:  # no message has extensions
        raise KeyError(kind)
    found, left = dict[str, bytes](), [wanted]
    while left:
        file = left.pop()
        if file.name not in found:
            found[file.name] = file.serialized_pb
            left += file.dependencies
    return [*found.values()]
