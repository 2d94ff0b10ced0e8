"""Spans of OpenTelemetry: one for each inference, over HTTP and gRPC. No sockets.

The attributes have the names of OpenTelemetry's semantic conventions. A span has an error only if the request failed by the
gateway's fault: status 500 and above of HTTP, and `_FAULTS` of gRPC.

`opentelemetry` is optional. This module imports it when a gateway opens, and only `Spans` and `Span` use it.
"""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc

from superserve_jax import errors
from superserve_jax.gateway import replies
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import statuses
from superserve_jax.gateway.messages import Request
from superserve_jax.serving.futures import Reply
from superserve_jax.subnet import Subnet

_SERVICE = "inference.GRPCInferenceService"
_PATH = re.compile(r"/v2/models/([^/]+)(/versions/[^/]*)?/infer")
_CODES = grpc.StatusCode
_FAULTS = (_CODES.UNKNOWN, _CODES.DEADLINE_EXCEEDED, _CODES.UNIMPLEMENTED, _CODES.INTERNAL, _CODES.UNAVAILABLE)
_PARENT, _STATE = "traceparent", "tracestate"
_MOST_HEADER = 512  # characters
_MOST_TEXT = 500  # characters of what clients send, and of an error
# OpenTelemetry logs a warning for any other tracestate. Clients could fill the log.
_KEY = r"(?:[a-z][a-z0-9_*/-]{0,200}|[a-z0-9][a-z0-9_*/-]{0,200}@[a-z][a-z0-9_*/-]{0,13})"
_MEMBER = rf"{_KEY}=[ -+\--<>-~]{{0,200}}[!-+\--<>-~]"
_IS_STATE = re.compile(rf"[ \t]*{_MEMBER}(?:[ \t]*,[ \t]*{_MEMBER}){{0,31}}[ \t]*")


class Span:
    """The span of an inference.

    Args:
      span: OpenTelemetry's span, which has started.
    """

    __slots__ = ("_error", "_span")

    def __init__(self, span: Any):
        self._span, self._error = span, ""

    def set_model(self, name: str) -> None:
        """Sets the name of the model, as the client wrote it."""
        self._span.set_attribute("superserve.model", name[:_MOST_TEXT])

    def set_replies(self, made: Sequence[Reply], ranks: Mapping[Subnet, int]) -> None:
        """Sets what the response tells in its parameters. For the arguments, see `replies.summary`."""
        if self._span.is_recording():
            found = replies.summary(made, ranks)
            for name in ("subnet", "accuracy", "queue_ms", "met_slo"):
                self._span.set_attribute(f"superserve.{name}", getattr(found, name))

    def set_error(self, error: BaseException) -> None:
        """Sets why the inference failed. It shows if the status is one of the gateway's faults."""
        self._error = errors.one_line(error)[:_MOST_TEXT]

    def end_http(self, status: int) -> None:
        """Ends the span of a request over HTTP, with the status of its answer."""
        self._span.set_attribute("http.response.status_code", status)
        self._end(str(status), is_fault=status >= 500)

    def end_grpc(self, error: BaseException | None = None) -> None:
        """Ends the span of a request over gRPC. None means that it has its response."""
        if isinstance(error, asyncio.CancelledError):  # the client has gone
            code = _CODES.CANCELLED
        else:
            code = _CODES.OK if error is None else statuses.code_of(error)
        if error is not None:
            self.set_error(error)
        self._span.set_attribute("rpc.response.status_code", code.name)
        self._end(code.name, is_fault=code in _FAULTS)

    def _end(self, status: str, *, is_fault: bool) -> None:
        if is_fault:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", status)
            self._span.set_status(Status(StatusCode.ERROR, self._error))
        self._span.end()


class Spans:
    """Makes spans. The parent of a span is the one in the client's headers traceparent and tracestate (W3C Trace Context).

    Args:
      tracer: a tracer of OpenTelemetry.
    """

    def __init__(self, tracer: Any):
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer, self._kind, self._propagator = tracer, SpanKind.SERVER, TraceContextTextMapPropagator()

    def http(self, request: Request) -> Span | None:
        """Starts the span of a request over HTTP, which has arrived. None if it is no inference."""
        try:
            path = request.path
        except RequestError:  # it gets status 400
            return None
        found = _PATH.fullmatch(path)
        if request.method != "POST" or found is None:
            return None
        route = f"/v2/models/{{model}}{'/versions/{version}' if found[2] else ''}/infer"
        about = {"http.request.method": "POST", "http.route": route, "url.path": path[:_MOST_TEXT]}
        headers = {name: request.headers.get(name.encode(), b"").decode("latin-1") for name in (_PARENT, _STATE)}
        span = self._start(f"POST {route}", about, headers)
        span.set_model(found[1])
        return span

    def grpc(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Span:
        """Starts the span of a request over gRPC, which has arrived.

        Args:
          method: the name of the method, such as "ModelInfer".
          metadata: the metadata of the call.
        """
        name, headers = f"{_SERVICE}/{method}", dict[str, str]()
        for key, value in metadata:
            if key in (_PARENT, _STATE) and isinstance(value, str):
                headers[key] = f"{headers[key]},{value}" if key in headers else value
        return self._start(name, {"rpc.system.name": "grpc", "rpc.method": name}, headers)

    def _start(self, name: str, attributes: Mapping[str, str], headers: Mapping[str, str]) -> Span:
        given = {key: value for key, value in headers.items() if len(value) <= _MOST_HEADER}
        if not _IS_STATE.fullmatch(given.get(_STATE, "")):
            given.pop(_STATE, None)
        parent = self._propagator.extract(given)
        return Span(self._tracer.start_span(name, parent, self._kind, attributes))


def find() -> Spans | None:
    """The maker of spans; None if OpenTelemetry is not installed, or if the program has set no provider of tracers."""
    try:
        from opentelemetry import trace
    except ImportError:  # it is optional
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    tracer = provider.get_tracer("superserve_jax.gateway")
    return None if isinstance(tracer, trace.NoOpTracer) else Spans(tracer)
