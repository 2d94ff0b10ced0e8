"""The gateway as an application: from a request of HTTP to an answer. No sockets.

The path of an inference:

    ServedModel.read -> ServedModel.submit -> await the futures -> ServedModel.write -> one answer

All steps run in the thread of the event loop. Only long work runs in other threads: long JSON, long texts, and compression.
The worker's thread wakes the loop when the server has answered a query. One wake-up serves all queries that are answered
before the loop runs (see `serving.futures`).
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import prometheus_client
import prometheus_client.openmetrics.exposition

from superserve_jax import errors
from superserve_jax.gateway import bodies, documents, failures, messages, requests, tensors, threads
from superserve_jax.gateway.failures import ClosingError, RequestError
from superserve_jax.gateway.live import LivePage
from superserve_jax.gateway.messages import Answer, Request
from superserve_jax.gateway.model import ServedModel, answers_to, find
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.spans import Spans
from superserve_jax.gateway.threads import LongWork

_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]*))?(?:/(ready|config|stats|infer))?")
_CHANGE = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")
_BINARY = (b"content-type", b"application/octet-stream")
_GET = ("GET", "HEAD")
_SMALL_BODY = 4096  # compressed bytes that are inflated in the event loop


_Body = TypeVar("_Body", bound=msgspec.Struct)


class _IndexBody(msgspec.Struct):
    ready: bool = False


class _ChangeBody(msgspec.Struct):
    parameters: dict[str, Any] = {}


class App:
    """The application.

    Args:
      models: the models, which may come and go.
      work: the threads for long work.
      page: the live page; None without one.
      spans: makes the spans of inferences; None makes none.

    Attributes:
      draining: True when the gateway is closing. It is not ready any more.
      max_body_bytes: the longest body of an inference, for any model.
    """

    def __init__(self, models: Repository, work: LongWork, page: LivePage | None = None, spans: Spans | None = None):
        self._models, self._work, self._page, self._spans = models, work, page, spans
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(documents.Metrics(self._models))
        self._documents: dict[str, Callable[[Request], Answer]] = {
            "/v2": self._metadata,
            "/v2/": self._metadata,
            "/v2/health/live": lambda _: _document({"live": True}),
            "/v2/health/ready": lambda _: self._ready(self._models.values(), {}),
            "/v2/models/stats": lambda _: _statistics(self._models.values()),
            "/metrics": self._metrics,
        }
        self.draining = False
        self.max_body_bytes = models.max_body_bytes

    async def answer(self, request: Request) -> Answer:
        """Answers one request. Errors become answers, too, and so does the cancellation of the task."""
        if self._spans is None:
            return await self._answer(request)
        request.span = self._spans.http(request)
        answer = await self._answer(request)
        if request.span is not None:
            request.span.end_http(failures.CLIENT_LEFT if request.left else answer.status)
        return answer

    async def _answer(self, request: Request) -> Answer:
        try:
            model = self._models.by_target.get(request.target)
            if model is not None and request.method == "POST":
                answer = await self._infer(model, request)
            else:
                answer = await self._other(request)
            accepted = request.headers.get(b"accept-encoding")
            if accepted is None or len(answer.body) < bodies.WORTH_IT:
                return answer
            return await self._work.many.run(bodies.compressed, answer, accepted)
        except (Exception, asyncio.CancelledError) as error:
            if request.span is not None:
                request.span.set_error(error)
            return messages.failed(error)

    async def _infer(self, model: ServedModel, request: Request) -> Answer:
        json_length, slo_ms = requests.json_length(request.headers), requests.slo_of(request.headers)
        if b"content-encoding" in request.headers and len(request.body) > _SMALL_BODY:
            body = await self._work.many.run(bodies.read, request, model.max_body_bytes)
        else:
            body = bodies.read(request, model.max_body_bytes)
        if len(body) > threads.SHORT_BYTES and (json_length is None or json_length > threads.SHORT_BYTES):
            wanted = await self._work.one.run(model.read, body, json_length)
        else:
            wanted = model.read(body, json_length)
        request.body = body = b""  # JSON is not needed any more
        if wanted.has_long_texts():
            wanted = wanted._replace(rows=await self._work.many.run(model.encoded, wanted.rows))
        queries = model.submit(wanted, slo_ms)
        made = await answers_to(queries)
        if request.span is not None:
            request.span.set_replies(made, model.ranks())
        if len(made) > threads.FEW_ROWS:
            body, json_length = await self._work.one.run(model.write, wanted, made)
        else:
            body, json_length = model.write(wanted, made)
        if json_length is None:
            return Answer(body)
        return Answer(body, 200, (_BINARY, (b"inference-header-content-length", b"%d" % json_length)))

    async def _other(self, request: Request) -> Answer:
        """Answers everything but an inference at its usual target."""
        path, method = request.path, request.method
        if path == "/v2/repository/index":
            _check_method(method, path, ("POST",))
            ready_only = _body(request, _IndexBody, "an index", '{"ready": true}').ready
            return _document(await self._models.index(ready_only=ready_only))
        if found := _CHANGE.fullmatch(path):
            _check_method(method, path, ("POST",))
            name, what = found.groups()
            parameters = _body(request, _ChangeBody, f"{what}ing a model", '{"parameters": {}}').parameters
            await (self._models.load if what == "load" else self._models.unload)(name, parameters)
            return _document({})
        if (found := _MODEL.fullmatch(path)) and path != "/v2/models/stats":
            return await self._about(*found.groups(), path=path, request=request)
        if self._page is not None and path in self._page.paths:
            _check_method(method, path, self._page.paths[path])
            return self._page.answer(request)
        if path not in self._documents:
            raise RequestError(f"there is no path {path[:200]!r}; docs/network.md lists all", status=404)
        _check_method(method, path, _GET)
        return self._documents[path](request)

    async def _about(self, name: str, version: str | None, what: str | None, *, path: str, request: Request) -> Answer:
        """Answers a request about one model."""
        model = find(self._models, name, version)
        _check_method(request.method, path, ("POST",) if what == "infer" else _GET)
        if what == "infer":  # the target has a query or an escape, or is a whole address
            return await self._infer(model, request)
        if what == "ready":
            return self._ready([model], {"name": name})
        if what == "stats":
            return _statistics([model])
        return _document(documents.model_config(model) if what == "config" else documents.model_metadata(model))

    def _ready(self, models: Iterable[ServedModel], fields: Mapping[str, str]) -> Answer:
        if self.draining:
            raise ClosingError("the gateway is shutting down; send requests to another replica")
        if waiting := sum(not model.is_ready() for model in models):  # not their names: a probe needs no token
            raise ClosingError(f"{waiting} of the models have no open server with a worker; try again later")
        return _document({**fields, "ready": True})

    def _metadata(self, _: Request) -> Answer:
        return _document(documents.server_metadata(can_change=self._models.can_change))

    def _metrics(self, request: Request) -> Answer:
        is_open = b"application/openmetrics-text" in request.headers.get(b"accept", b"")
        form = prometheus_client.openmetrics.exposition if is_open else prometheus_client
        return Answer(form.generate_latest(self._registry), 200, ((b"content-type", form.CONTENT_TYPE_LATEST.encode()),))


def _document(value: Any) -> Answer:
    return Answer(msgspec.json.encode(value))


def _statistics(models: Iterable[ServedModel]) -> Answer:
    return _document({"model_stats": [documents.model_statistics(model) for model in models]})


def _check_method(method: str, path: str, allowed: Sequence[str]) -> None:
    if method not in allowed:
        names = ", ".join(allowed)
        raise RequestError(
            f"{method[:20]} is not possible for {path[:200]}; use {names}", status=405, headers=[(b"allow", names.encode())]
        )


def _body(request: Request, kind: type[_Body], about: str, example: str) -> _Body:
    """The small body of a request. An empty one has the defaults."""
    body = bodies.read(request, bodies.MOST_SMALL)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except tensors.MALFORMED as e:
        raise RequestError(
            f"the body is not a request for {about}: {errors.one_line(e)[:300]}; send {example}, or nothing"
        ) from e
