"""A server under its name: what clients send to it, and what they get."""

import contextlib
import math
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from superserve_jax import errors
from superserve_jax.gateway import replies, requests, tensors
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.limits import Limits, body_limit
from superserve_jax.gateway.requests import InferRequest
from superserve_jax.gateway.tensors import InputTensor
from superserve_jax.serving.futures import Future, Reply
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet
from superserve_jax.vocabulary import TokenConfig

VERSION = "1"
"""The only version of every model."""
_Model = TypeVar("_Model")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_RESERVED = ("stats",)  # the path /v2/models/stats
_PROBE_MS = 60_000.0
_DEFAULT_LIMITS = Limits()


@runtime_checkable
class _TextConfig(TokenConfig, Protocol):
    """The config of a family whose inputs are token ids (T,), or token ids and types (T, 2)."""

    @property
    def token_types(self) -> int:
        """Number of token types."""
        ...


class ServedModel:
    """A server under a name.

    Args:
      name: the name in paths: letters, digits, and the signs _.- inside.
      server: the server. It stays the caller's, who also closes it.
      limits: the limits of the gateway.

    Attributes:
      input: the input of the model.
      max_body_bytes: the longest body of a request.

    A server of engines has no export that tells its outputs. So the constructor submits a blank input, and waits for the
    answer.

    Raises ConfigError for a wrong name, for another object than a server, for a server that does not answer, or if the
    protocol has no name for a dtype. Raises DataError if texts need a package that is not installed.
    """

    def __init__(self, name: str, server: Server, limits: Limits = _DEFAULT_LIMITS):
        if not isinstance(server, Server):
            raise errors.ConfigError(f"a gateway serves a superserve_jax.Server, got {type(server).__name__}; open one first")
        check_name(name)
        self.name, self.server = name, server
        inputs = server.inputs
        if inputs.dtype not in tensors.NAMES:
            raise errors.ConfigError(f"the protocol has no datatype for inputs of {inputs.dtype}; serve another dtype")
        texts = 0 if server.model is None else _texts(server.model)
        most, is_text = server.pool.backlog.most, bool(inputs.lengths)
        self.input = InputTensor(inputs.shape, inputs.dtype, any_length=is_text, texts=texts, most=most)
        self._last = 0, 0  # number of batches, and when the last one ended
        self.max_body_bytes = body_limit(limits, inputs.nbytes)
        self._output = self._probe() if server.model is None else None

    def read(self, body: bytes, json_length: int | None) -> InferRequest:
        """See `requests.read`. Also raises RequestError for an unknown token id, or if the model has no classes to return."""
        return self._fitting(requests.read(body, json_length, self.input))

    def read_fields(self, fields: Mapping[str, Any], data: bytes) -> InferRequest:
        """See `requests.from_fields`. Also raises RequestError as `read`."""
        return self._fitting(requests.from_fields(fields, data, self.input))

    def _fitting(self, request: InferRequest) -> InferRequest:
        if any(wanted.classes for wanted in request.wanted):
            datatype, shape = self.output()
            if len(shape) != 1 or not datatype.startswith("FP"):
                raise RequestError("output 'output' is no vector of logits, so it has no classes; leave out `classification`")
        if self.input.any_length and isinstance(request.rows, np.ndarray):
            self._check_tokens(request.rows)
        return request

    def submit(self, request: InferRequest, slo_ms: float | None) -> Sequence[Future]:
        """Submits the rows of a request, with its own deadline or else `slo_ms`. Returns a future for each row.

        Raises what `Server.submit` raises, and RequestError if the queue has no room for so many rows even when it is empty.
        """
        slo_ms, floor = slo_ms if request.slo_ms is None else request.slo_ms, request.min_accuracy
        rows = request.rows
        if isinstance(rows, list):
            rows = self.encoded(rows)
        if len(rows) == 1:
            return (self.server.submit(rows[0], slo_ms=slo_ms, min_accuracy=floor),)
        try:
            return self.server.submit_many(rows, slo_ms=slo_ms, min_accuracy=floor)
        except errors.QueueFullError:
            if not self.server.pool.backlog.could_hold([len(row) for row in rows]):
                raise RequestError(f"the request has {len(rows)} inputs, too many for the queue; split it") from None
            raise

    def write(self, request: InferRequest, made: Sequence[Reply]) -> tuple[bytes, int | None]:
        """See `replies.write`."""
        return replies.write(self.name, request, made, self.ranks())

    def ranks(self) -> dict[Subnet, int]:
        """The position of each subnet, as in `Server.snapshot`. Subnets of an export from before a swap have none."""
        return self.server.pool.counters.ranks

    def output(self) -> tuple[str, list[int]]:
        """Datatype of an output, and its shape without a batch dimension."""
        return self._output or ("FP32", [self.server.model.config.num_classes])

    def answer_bytes(self, rows: int) -> int:
        """The bytes of the outputs for so many rows."""
        datatype, shape = self.output()
        return rows * math.prod(shape) * tensors.DTYPES[datatype].itemsize

    def last_inference_ms(self, batches: int, ago_s: float | None) -> int:
        """When the last batch ended, in milliseconds since 1970; 0 before the first one.

        Args:
          batches: how many have ended. As long as it is the same, so is the result.
          ago_s: how long ago the last one ended.
        """
        if ago_s is None:
            return 0
        if batches != self._last[0]:
            self._last = batches, int(1e3 * (time.time() - ago_s))
        return self._last[1]

    def is_ready(self) -> bool:
        """Whether the server is open and has a worker."""
        health = self.server.health()
        return not health["closed"] and health["alive"] > 0

    def _probe(self) -> tuple[str, list[int]]:
        """Submits one blank input to a server of engines, to learn what an output is. It counts in the statistics."""
        shape = (1, *self.input.shape[1:]) if self.input.any_length else self.input.shape
        blank = np.full(shape, int(self.server.inputs.pad_id == 0) if self.input.any_length else 0, self.input.dtype)
        try:
            rows = replies.stacked([self.server.submit(blank, slo_ms=_PROBE_MS).result(timeout=1e-3 * _PROBE_MS)])
        except Exception as e:  # what an engine raises, too
            raise errors.ConfigError(
                f"the server of model '{self.name}' does not answer a blank input: {errors.one_line(e)}; give one that serves"
            ) from e
        return tensors.NAMES[rows.dtype], [*rows.shape[1:]]

    def _check_tokens(self, rows: np.ndarray) -> None:
        """Raises RequestError for a token id or type outside the vocabulary. jax would clamp the id and use another token."""
        config = None if self.server.model is None else self.server.model.config
        if not isinstance(config, _TextConfig):
            return
        columns = [rows] if rows.ndim == 2 else [rows[..., 0], rows[..., 1]]
        for what, values, count in zip(("id", "type"), columns, (config.vocab_size, config.token_types), strict=False):
            if values.min() < 0 or values.max() >= count:
                wrong = values[(values < 0) | (values >= count)][0]
                raise RequestError(f"input 'input' has the token {what} {wrong}, expected 0 to {count - 1}")

    def encoded(self, rows: list[list[str]]) -> np.ndarray:
        """Token ids of texts, exactly as in training. Any thread may call it."""
        firsts = [row[0] for row in rows]
        return self.server.model.encode(firsts, [row[1] for row in rows] if len(rows[0]) > 1 else None)


def find(models: Mapping[str, _Model], name: str, version: str | None = None) -> _Model:
    """The model with a name, or what belongs to it.

    Raises RequestError (404) for an unknown name, or another version than None and `VERSION`.
    """
    if name not in models:
        raise RequestError(str(errors.unknown_name("model", name, models)), status=404)
    if version not in (None, VERSION):
        raise RequestError(f"model '{name}' has no version {version[:50]!r}; its only version is '{VERSION}'", status=404)
    return models[name]


async def answers_to(queries: Sequence[Future]) -> list[Reply]:
    """The replies to the queries of a request. If one fails, or if the task is cancelled, all of them are cancelled."""
    try:
        return [await query for query in queries]
    except BaseException:
        for query in queries:
            query.cancel()
        raise


def may_be_name(name: Any) -> bool:
    """Whether this may be the name of a model."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and name not in _RESERVED


def check_name(name: Any) -> None:
    """Raises ConfigError unless this may be the name of a model."""
    if not may_be_name(name):
        raise errors.ConfigError(
            f"{name!r} cannot be the name of a model; expected letters, digits, and _.- inside, and not {_RESERVED[0]!r}"
        )


def default_name(server: Server) -> str:
    """The name of a server's model, as `name_of_export`; "supernet" for a server of engines."""
    return "supernet" if not isinstance(server, Server) or server.model is None else name_of_export(server.model.path)


def name_of_export(path: str | os.PathLike[str]) -> str:
    """The name of an export: its folder or, if that is called "export", the folder around it.

    >>> name_of_export("digits"), name_of_export("runs/demo/export")
    ('digits', 'demo')
    """
    path = pathlib.Path(path).resolve()
    name = path.parent.name if path.name == "export" else path.name
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".-")[:90] or "supernet"
    return f"{name}-model" if name in _RESERVED else name


def named(exports: Iterable[str]) -> dict[str, str]:
    """The exports of a command line by name. Each is "EXPORT" or "NAME=EXPORT".

    A text with a separator of folders before its first "=" is a path.

    >>> named(["digits", "other=runs/demo/export"])
    {'digits': 'digits', 'other': 'runs/demo/export'}

    Raises ConfigError for a wrong name, and for a name that comes twice.
    """
    found = dict[str, str]()
    for text in exports:
        name, is_named, path = text.partition("=")
        if not is_named or os.sep in name:
            name, path = name_of_export(text), text
        check_name(name)
        if name in found:
            raise errors.ConfigError(
                f"{found[name]} and {path} would both have the name '{name}'; give one of them another name: other={path}"
            )
        found[name] = path
    return found


def _texts(model: Any) -> int:
    """How many texts an input may have: 0 without a vocabulary, 2 for pairs. Loads what splits texts into tokens."""
    if not model.vocabulary:
        return 0
    model.encode([""])
    with contextlib.suppress(errors.InputError):
        model.encode([""], [""])
        return 2 if isinstance(model.config, _TextConfig) and model.config.token_types > 1 else 1
    return 1
