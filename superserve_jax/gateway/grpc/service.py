"""The calls of the service inference.GRPCInferenceService. `methods.of_service` makes them methods of gRPC."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc

from superserve_jax import errors
from superserve_jax.gateway import bodies, documents, requests
from superserve_jax.gateway.failures import ClosingError, RequestError
from superserve_jax.gateway.grpc import calls, codec, messages, methods, wire
from superserve_jax.gateway.grpc.calls import Call, Method
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.model import ServedModel, answers_to, find
from superserve_jax.gateway.requests import InferRequest
from superserve_jax.serving.futures import Future

NAME = "inference.GRPCInferenceService"
MOST_IN_STREAM = 256
"""Requests of a stream that may wait for their answers. The next one is read when the first of them is answered."""

_PROBES = ("ServerLive", "ServerReady", "ModelReady")
_Request = messages.named("inference.ModelInferRequest")
_StreamResponse = messages.named("inference.ModelStreamInferResponse")
_SLO = {"x-slo-ms": b"x-slo-ms", "x-slo-ttft-ms": b"x-slo-ttft-ms"}  # names in the metadata, and for `requests.slo_of`


class _Started(NamedTuple):
    """A request whose queries wait."""

    message: Any
    model: ServedModel
    request: InferRequest
    queries: tuple[Future, ...]
    size: int


class Service:
    """The service.

    Args:
      models: the models by name.
      limits: what clients may do.

    Attributes:
      draining: whether the gateway says that it is not ready, since it closes soon.
      closing: whether new inferences get status UNAVAILABLE.
      refused: how many inferences got it.
      waiting: the queries whose calls are not answered yet.
    """

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits):
        self._models, self._limits, self._bytes = models, limits, 0
        self.draining, self.closing, self.refused = False, False, 0
        self.waiting = set[Future]()

    def methods(self, allows: calls.Allows | None = None) -> dict[str, Method]:
        """The protocol's methods that the gateway has. For `allows`, see `methods.of_service`."""
        return methods.of_service(
            NAME,
            {
                "ServerLive": lambda _: {"live": True},
                "ServerReady": lambda _: {"ready": self.is_ready()},
                "ModelReady": lambda message: {"ready": self.is_ready(self._model(message).name)},
                "ServerMetadata": lambda _: documents.server_metadata(),
                "ModelMetadata": lambda message: documents.model_metadata(self._model(message)),
                "ModelConfig": lambda message: {"config": documents.model_config(self._model(message))},
                "ModelStatistics": self._statistics,
                "RepositoryIndex": lambda message: {
                    "models": documents.repository_index(self._models.values(), ready_only=message.ready)
                },
                "ModelInfer": self._infer,
                "ModelStreamInfer": self._stream,
            },
            allows,
            probes=_PROBES,
            kinds=dict.fromkeys(("ModelInfer", "ModelStreamInfer"), "inference"),
        )

    def is_ready(self, name: str | None = None) -> bool:
        """Whether a model is ready, or all of them for None."""
        models = self._models.values() if name is None else [self._models[name]]
        return not self.draining and all(model.is_ready() for model in models)

    def _model(self, message: Any) -> ServedModel:
        return find(self._models, message.name, message.version or None)

    def _statistics(self, message: Any) -> dict[str, Any]:
        models = [self._model(message)] if message.name else self._models.values()
        return {"model_stats": [documents.model_statistics(model) for model in models]}

    async def _infer(self, call: Call) -> bytes:
        data = await call.read(self._limits.body_s)
        left_s = call.context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise errors.DeadlineExpiredError("the deadline of the call had passed when it came")
        slo_ms = _slo_ms(call)
        if slo_ms is None and left_s is not None:
            slo_ms = 1e3 * left_s
        started = self._start(_parsed(data), len(data), slo_ms)
        return (await self._finish(started)).SerializeToString()

    def _start(self, message: Any, size: int, slo_ms: float | None) -> _Started:
        """Submits the queries of a request of `size` bytes."""
        if self.closing:
            self.refused += 1
            raise ClosingError("the gateway is shutting down; send the request to another replica")
        if self._bytes + size > self._limits.max_buffered_bytes:
            raise RequestError("too many bytes of requests wait for their answers; try again later", status=503)
        model = find(self._models, message.model_name, message.model_version or None)
        if size > model.max_body_bytes:
            raise bodies.too_long(model.max_body_bytes)
        request = codec.read(model, message)
        queries = tuple(model.submit(request, slo_ms))
        self.waiting.update(queries)
        self._bytes += size
        return _Started(message, model, request, queries, size)

    async def _finish(self, started: _Started) -> Any:
        """The response to a request, when its queries are answered."""
        try:
            return codec.write(started.model, started.request, await answers_to(started.queries))
        finally:
            self._release(started)

    def _release(self, started: _Started) -> None:
        self.waiting.difference_update(started.queries)
        self._bytes -= started.size

    async def _stream(self, call: Call) -> None:
        """Answers the requests of a stream in their order. An error of one is in its response, and the stream goes on."""
        slo_ms = _slo_ms(call)
        started = asyncio.Queue[_Started | tuple[Any, Exception] | None]()  # (message, error) after an error, None at the end
        slots = asyncio.Semaphore(MOST_IN_STREAM)
        ended = False

        async def read() -> None:
            with contextlib.suppress(grpc.aio.BaseError):  # the call has ended
                while await slots.acquire() and not ended:
                    data = await call.next(self._limits.idle_s)
                    if data is None or ended:
                        break
                    call.unanswered += 1
                    message = _Request()
                    try:
                        message = _parsed(data)
                        started.put_nowait(self._start(message, len(data), slo_ms))
                    except Exception as error:
                        started.put_nowait((message, error))
            started.put_nowait(None)

        call.start(read())
        try:
            while (one := await started.get()) is not None:
                response = (await self._answer(one)).SerializeToString()
                async with asyncio.timeout(self._limits.write_s):
                    await call.write(response)
                call.unanswered -= 1
                slots.release()
        except TimeoutError:
            raise RequestError("the stream ended, since nobody read its answers; read them", status=408) from None
        finally:
            ended = True
            slots.release()
            while not started.empty():
                if isinstance(one := started.get_nowait(), _Started):
                    for query in one.queries:
                        query.cancel()
                    self._release(one)

    async def _answer(self, one: _Started | tuple[Any, Exception]) -> Any:
        """The response of a stream to one request."""
        response = _StreamResponse()
        try:
            if not isinstance(one, _Started):
                raise one[1]
            response.infer_response.CopyFrom(await self._finish(one))
        except Exception as error:
            response.error_message = calls.text_of(error)
            response.infer_response.id = one[0].id
        return response


def _parsed(data: bytes) -> Any:
    wire.check_fields(data)
    return methods.parsed(_Request, data)


def _slo_ms(call: Call) -> float | None:
    """The deadline in the metadata of a call, in milliseconds, or None."""
    found = dict[bytes, bytes]()
    for name, value in call.metadata():
        if name in _SLO:
            if _SLO[name] in found:
                raise RequestError(f"the metadata {name} are repeated; send them once")
            found[_SLO[name]] = str(value).encode()
    return requests.slo_of(found) if found else None
