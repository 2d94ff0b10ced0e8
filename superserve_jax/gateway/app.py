"""The gateway as an ASGI application: from a request of HTTP to an answer.

The path of an inference, all in the thread of the event loop until the query is in the server's queue:

    bodies.read -> ServedModel.read -> ServedModel.submit -> await the futures -> ServedModel.write -> one answer

An answer wakes the loop from the worker's thread. One wake-up serves all queries that are answered before the loop runs (see
`serving.futures`). A plain ASGI callable, since a framework would cost more than this whole path.

A connection may put a list `queries` into the ASGI state. It holds the queries that are being awaited, so that the connection
can cancel them when its client goes away (see `connections.py`).
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import msgspec
import prometheus_client
from prometheus_client import exposition

from superserve_jax import errors
from superserve_jax.gateway import bodies, documents, failures, requests, tensors
from superserve_jax.gateway.model import VERSION, ServedModel, unknown_model
from superserve_jax.gateway.tensors import RequestError

Headers = Sequence[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_MODEL = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]*))?(?:/(ready|config|stats|infer))?")
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_CLOSE = (b"connection", b"close")
_READING = (b"GET", b"HEAD")


class _Answer(NamedTuple):
    """A response. Its headers lack the body's length, which `App` adds."""

    body: bytes
    status: int = 200
    headers: Headers = (_JSON,)


class _IndexBody(msgspec.Struct):
    ready: bool = False


class App:
    """The ASGI application.

    Args:
      models: the models by name.
      max_body_bytes: the limit of a body, as it is sent and inflated.

    Attributes:
      draining: True when the gateway closes. It is not ready any more, and every answer closes its connection.
    """

    def __init__(self, models: Mapping[str, ServedModel], *, max_body_bytes: int):
        self._models, self._max_body_bytes = dict(models), max_body_bytes
        self._infer_at = {
            f"/v2/models/{name}{version}/infer": model
            for name, model in self._models.items()
            for version in ("", f"/versions/{VERSION}")
        }
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(documents.Metrics(self._models))
        self.draining = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one request."""
        headers = dict(scope["headers"])
        try:
            model = self._infer_at.get(scope["path"])
            if model is not None and scope["method"] == "POST":
                answer = await self._infer(model, headers, receive, scope.get("state", {}).get("queries"))
            else:
                answer = await self._other(scope["path"], scope["method"], headers, receive)
        except bodies.DisconnectedError:
            return
        except (Exception, asyncio.CancelledError) as error:
            answer = _failed(error)
        body, coding = bodies.compressed(answer.body, headers.get(b"accept-encoding"))
        sent = [*answer.headers, (b"content-length", b"%d" % len(body))]
        if coding is not None:
            sent.append((b"content-encoding", coding))
        if self.draining:
            sent.append(_CLOSE)
        await send({"type": "http.response.start", "status": answer.status, "headers": sent})
        await send({"type": "http.response.body", "body": body})

    async def _infer(
        self, model: ServedModel, headers: Mapping[bytes, bytes], receive: Receive, awaited: list[Any] | None
    ) -> _Answer:
        json_length, slo_ms = requests.json_length(headers), requests.slo_of(headers)
        body = await bodies.read(receive, headers, self._max_body_bytes)
        request = model.read(body, json_length)
        queries = model.submit(request, slo_ms)
        if awaited is not None:
            awaited += queries
        try:
            made = [await query for query in queries]
        except BaseException:
            for query in queries:
                query.cancel()
            raise
        finally:
            if awaited is not None:
                awaited.clear()
        body, json_length = model.write(request, made)
        if json_length is None:
            return _Answer(body)
        return _Answer(body, 200, (_BINARY, (b"inference-header-content-length", b"%d" % json_length)))

    async def _other(self, path: str, method: str, headers: Mapping[bytes, bytes], receive: Receive) -> _Answer:
        """Answers everything but an inference."""
        if path == "/v2/repository/index":
            _check_method(method, path, ("POST",))
            body = await bodies.read(receive, headers, self._max_body_bytes)
            return _document(documents.repository_index(self._models.values(), ready_only=_ready_only(body)))
        if (found := _MODEL.fullmatch(path)) and path != "/v2/models/stats":
            return self._about(*found.groups(), path=path, method=method)
        answers: dict[str, Callable[[], _Answer]] = {
            "/v2": lambda: _document(documents.server_metadata()),
            "/v2/": lambda: _document(documents.server_metadata()),
            "/v2/health/live": lambda: _document({"live": True}),
            "/v2/health/ready": lambda: self._ready(self._models.values()),
            "/v2/models/stats": lambda: _statistics(self._models.values()),
            "/metrics": lambda: self._metrics(headers),
        }
        if path not in answers:
            raise RequestError(f"there is no path {path[:200]!r}; docs/serving.md lists all", status=404)
        _check_method(method, path, ("GET", "HEAD"))
        return answers[path]()

    def _about(self, name: str, version: str | None, what: str | None, *, path: str, method: str) -> _Answer:
        """Answers a request about one model."""
        if (model := self._models.get(name)) is None:
            raise unknown_model(name, [*self._models])
        if version not in (None, VERSION):
            raise RequestError(f"model '{name}' has no version {version[:50]!r}; its only version is '{VERSION}'", status=404)
        _check_method(method, path, ("POST",) if what == "infer" else ("GET", "HEAD"))
        if what == "ready":
            return self._ready([model])
        if what == "stats":
            return _statistics([model])
        return _document(documents.model_config(model) if what == "config" else documents.model_metadata(model))

    def _ready(self, models: Iterable[ServedModel]) -> _Answer:
        if self.draining:
            raise errors.ServerClosedError("the gateway closes and takes no new connections; send requests to another one")
        if waiting := [model.name for model in models if not model.is_ready()]:
            raise errors.ServerClosedError(
                f"not ready, since closed or without workers: {', '.join(waiting)}; open them again"
            )
        return _document({"ready": True})

    def _metrics(self, headers: Mapping[bytes, bytes]) -> _Answer:
        encode, kind = exposition.choose_encoder(headers.get(b"accept", b"").decode("latin-1"))
        return _Answer(encode(self._registry), 200, ((b"content-type", kind.encode()),))


def _document(value: Any) -> _Answer:
    return _Answer(msgspec.json.encode(value))


def _statistics(models: Iterable[ServedModel]) -> _Answer:
    return _document({"model_stats": [documents.model_statistics(model) for model in models]})


def _failed(error: BaseException) -> _Answer:
    """The answer for an error: JSON with `error`, which says what to do."""
    if isinstance(error, asyncio.CancelledError):  # the gateway closes, and this request took too long
        error = errors.ServerClosedError("the gateway has closed before the answer was there; send the request again")
    status = failures.status_of(error)
    headers = [_JSON, *(error.headers if isinstance(error, RequestError) else ())]
    if status in failures.RETRY:
        headers.append(failures.RETRY_AFTER)
    return _Answer(msgspec.json.encode({"error": failures.message_of(error)}), status, headers)


def _check_method(method: str, path: str, allowed: Sequence[str]) -> None:
    if method not in allowed:
        names = ", ".join(allowed)
        raise RequestError(
            f"{method[:20]} is not possible for {path[:200]}; use {names}", status=405, headers=[(b"allow", names.encode())]
        )


def _ready_only(body: bytes) -> bool:
    """The field `ready` of a request for the index. An empty body asks for all models."""
    try:
        return bool(body) and msgspec.json.decode(body, type=_IndexBody).ready
    except tensors.MALFORMED as e:
        raise RequestError(
            f'the body is no request for an index: {errors.one_line(e)[:300]}; send {{"ready": true}}, or nothing'
        ) from e
