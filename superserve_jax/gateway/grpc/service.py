"""The calls of the service inference.GRPCInferenceService. `methods.of_service` makes them methods of gRPC."""

import asyncio
import math
from typing import Any

import grpc

from superserve_jax import errors
from superserve_jax.gateway import bodies, documents, requests, threads
from superserve_jax.gateway.failures import ClosingError, RequestError
from superserve_jax.gateway.grpc import codec, messages, methods, repository, statuses, wire
from superserve_jax.gateway.grpc.calls import Allows, Call, Method
from superserve_jax.gateway.limits import REQUEST_BYTES, Limits
from superserve_jax.gateway.model import ServedModel, answers_to, find
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.requests import InferRequest
from superserve_jax.gateway.spans import Span, Spans
from superserve_jax.gateway.threads import LongWork
from superserve_jax.serving.futures import Future

NAME = "inference.GRPCInferenceService"
MOST_IN_STREAM = 256
"""Requests of a stream that may wait for their answers. The next one is read when the first of them is answered."""

_MOST_ID = 1000  # characters of an id that an error repeats
_KINDS = {
    **dict.fromkeys(("ModelInfer", "ModelStreamInfer"), "inference"),
    **dict.fromkeys(repository.CHANGES, "change"),
}
_PROBES = ("ServerLive", "ServerReady", "ModelReady")
_Request = messages.named("inference.ModelInferRequest")
_StreamResponse = messages.named("inference.ModelStreamInferResponse")
_SLO = {"x-slo-ms": b"x-slo-ms", "x-slo-ttft-ms": b"x-slo-ttft-ms"}  # names in the metadata, and for `requests.slo_of`


class _Work:
    """A request, from its message to its response.

    Attributes:
      id: its id.
      held: its bytes in memory, with those of its answer.
      error: what the client of a stream reads, if there are no queries.
      span: its span, until that ends; None unless the gateway makes spans.
    """

    __slots__ = ("error", "held", "id", "model", "queries", "request", "span")

    def __init__(self, id: str = "", error: str = ""):
        self.id, self.error, self.held, self.queries = id, error, 0, tuple[Future, ...]()
        self.model: ServedModel
        self.request: InferRequest
        self.span: Span | None = None

    def cancel(self) -> None:
        """Cancels its queries."""
        for query in self.queries:
            query.cancel()

    def end_span(self, error: BaseException | None = None) -> None:
        """Ends its span. None means that it has its response. Later calls have no effect."""
        if self.span is not None:
            self.span.end_grpc(error)
            self.span = None


class Service:
    """The service.

    Args:
      models: the models, which may come and go.
      limits: what clients may do.
      work: the threads for long work.
      spans: makes the spans of inferences; None makes none.

    Attributes:
      draining: whether the gateway says that it is not ready, since it closes soon.
      closing: whether new inferences get status UNAVAILABLE.
      refused: how many inferences got it.
      waiting: the requests that are not answered yet.
    """

    def __init__(self, models: Repository, limits: Limits, work: LongWork, spans: Spans | None = None):
        self._models, self._limits, self._work, self._spans = models, limits, work, spans
        self.draining, self.closing, self.refused = False, False, 0
        self.waiting = set[_Work]()

    def methods(self, allows: Allows | None = None) -> dict[str, Method]:
        """The protocol's methods that the gateway has. For `allows`, see `methods.of_service`."""
        return methods.of_service(
            NAME,
            {
                "ServerLive": lambda _: {"live": True},
                "ServerReady": lambda _: {"ready": self.is_ready()},
                "ModelReady": lambda message: {"ready": self.is_ready(self._model(message).name)},
                "ServerMetadata": lambda _: documents.server_metadata(can_change=self._models.can_change),
                "ModelMetadata": lambda message: documents.model_metadata(self._model(message)),
                "ModelConfig": lambda message: {"config": documents.model_config(self._model(message))},
                "ModelStatistics": self._statistics,
                **repository.answers(self._models),
                "ModelInfer": self._infer,
                "ModelStreamInfer": self._stream,
            },
            allows,
            probes=_PROBES,
            kinds=_KINDS,
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

    def cancel(self) -> None:
        """Cancels the queries of all requests."""
        for work in [*self.waiting]:
            work.cancel()

    async def _infer(self, call: Call) -> bytes:
        data, work = await call.read(self._limits.body_s), _Work()
        if self._spans is not None:
            work.span = self._spans.grpc("ModelInfer", call.metadata())
        try:
            if _left_s(call) <= 0:
                raise errors.DeadlineExpiredError("the deadline of the call had passed when it came")
            slo_ms = _slo_ms(call)
            await self._read(call, work, data)
            del data  # the arrays have their own copy
            if slo_ms is None and (left_s := _left_s(call)) < math.inf:
                slo_ms = 1e3 * left_s
            self._submit(call, work, slo_ms)
            response = (await self._response(work)).SerializeToString()
            work.end_span()
            return response
        except BaseException as error:
            work.end_span(error)
            raise
        finally:
            self.waiting.discard(work)  # its bytes count until the client has taken the response

    async def _read(self, call: Call, work: _Work, data: bytes) -> None:
        """Reads a request. Long ones are read in other threads."""
        if self.closing:
            self.refused += 1
            raise ClosingError
        nbytes = len(data) + REQUEST_BYTES
        call.hold(nbytes)
        work.held = nbytes
        self.waiting.add(work)
        if len(data) > threads.SHORT_BYTES:
            await self._work.one.run(self._parse, work, data)
        else:
            self._parse(work, data)
        if work.request.has_long_texts():
            rows = await self._work.many.run(work.model.encoded, work.request.rows)
            work.request = work.request._replace(rows=rows)

    def _parse(self, work: _Work, data: bytes) -> None:
        """Reads a request in any thread."""
        wire.check_fields(data)
        message = methods.parsed(_Request, data)
        work.id = message.id[:_MOST_ID]
        if work.span is not None:
            work.span.set_model(message.model_name)
        work.model = find(self._models, message.model_name, message.model_version or None)
        if len(data) > work.model.max_body_bytes:
            raise bodies.too_long(work.model.max_body_bytes)
        work.request = codec.read(work.model, message)

    def _submit(self, call: Call, work: _Work, slo_ms: float | None) -> None:
        """Submits the queries of a request that has been read."""
        work.queries = tuple(work.model.submit(work.request, slo_ms))
        nbytes = work.model.answer_bytes(len(work.queries))
        work.held += nbytes
        call.count(nbytes)

    async def _response(self, work: _Work) -> Any:
        """The response to a request, when its queries are answered."""
        made = await answers_to(work.queries)
        if work.span is not None:
            work.span.set_replies(made, work.model.ranks())
        if len(made) > threads.FEW_ROWS:
            return await self._work.one.run(codec.write, work.model, work.request, made)
        return codec.write(work.model, work.request, made)

    def _drop(self, call: Call, work: _Work) -> None:
        """Forgets a request of a stream. One without a response was cancelled."""
        work.end_span(asyncio.CancelledError())
        self.waiting.discard(work)
        call.count(-work.held)
        work.held = 0

    async def _stream(self, call: Call) -> None:
        """Answers the requests of a stream in their order. An error of one is in its response, and the stream goes on."""
        slo_ms = _slo_ms(call)
        started = asyncio.Queue[_Work | None]()  # None at the end
        slots = asyncio.Semaphore(MOST_IN_STREAM)
        ended = False

        async def read() -> None:
            try:
                while await slots.acquire() and not ended:
                    data = await call.next(self._limits.idle_s)
                    if data is None or ended:
                        break
                    call.unanswered += 1
                    work = _Work()
                    if self._spans is not None:
                        work.span = self._spans.grpc("ModelStreamInfer", call.metadata())
                    try:
                        await self._read(call, work, data)
                        if not ended:
                            self._submit(call, work, slo_ms)
                    except Exception as error:
                        work.end_span(error)
                        self._drop(call, work)
                        work = _Work(work.id, statuses.text_of(error))  # the error itself would hold the message
                    del data  # the arrays have their own copy
                    if ended:
                        self._drop(call, work)
                        break
                    started.put_nowait(work)
            except grpc.aio.BaseError:  # the call has ended
                pass
            finally:
                started.put_nowait(None)

        reading = call.start(read())
        try:
            while (work := await started.get()) is not None:
                try:
                    await call.write(await self._answer(work))
                finally:
                    self._drop(call, work)
                call.unanswered -= 1
                slots.release()
            await reading  # raises what it raised
        finally:
            ended = True
            slots.release()
            while not started.empty():
                if (work := started.get_nowait()) is not None:
                    work.cancel()
                    self._drop(call, work)

    async def _answer(self, work: _Work) -> bytes:
        """The response of a stream to one request."""
        response = _StreamResponse()
        try:
            if work.error:
                response.error_message, response.infer_response.id = work.error, work.id
            else:
                response.infer_response.CopyFrom(await self._response(work))
            work.end_span()
        except Exception as error:
            work.end_span(error)
            response.error_message = statuses.text_of(error)
            response.infer_response.id = work.id
        finally:
            self.waiting.discard(work)  # its bytes count until the client has taken the response
        return response.SerializeToString()


def _left_s(call: Call) -> float:
    """The time until the deadline of a call; infinity without one."""
    left_s = call.context.time_remaining()
    return math.inf if left_s is None else left_s


def _slo_ms(call: Call) -> float | None:
    """The deadline in the metadata of a call, in milliseconds, or None."""
    found = dict[bytes, bytes]()
    for name, value in call.metadata():
        if name in _SLO:
            if _SLO[name] in found:
                raise RequestError(f"the metadata {name} are repeated; send them once")
            found[_SLO[name]] = str(value).encode()
    return requests.slo_of(found) if found else None
