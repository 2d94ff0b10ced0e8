"""Replies to requests for inference: from the server's replies to the body of a response. No sockets."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from superserve_jax import errors
from superserve_jax.gateway import tensors
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.requests import OUTPUT, InferRequest, Wanted
from superserve_jax.serving.futures import Reply
from superserve_jax.subnet import Subnet

# Datatypes of the outputs that have one value per input.
_FIELDS = {"subnet": "INT32", "accuracy": "FP64", "latency_ms": "FP64", "queue_ms": "FP64", "met_slo": "BOOL"}


class OutputTensor(NamedTuple):
    """An output with its values. `values` is an array, or a flat list of texts with the datatype BYTES."""

    name: str
    datatype: str
    shape: Sequence[int]
    values: "np.ndarray | list[str]"


class Summary(NamedTuple):
    """The parameters of a response. They summarize all rows.

    Args:
      subnet: the position in the profile of each row's subnet, separated by commas.
      accuracy: the lowest accuracy of the rows' subnets, a fraction of 1.
      latency_ms, queue_ms: the longest time of a row, in milliseconds.
      met_slo: whether all rows were in time.
    """

    subnet: str
    accuracy: float
    latency_ms: float
    queue_ms: float
    met_slo: bool


def summary(replies: Sequence[Reply], ranks: Mapping[Subnet, int]) -> Summary:
    """The parameters of a response.

    Args:
      replies: one for each row of the request.
      ranks: the position of each subnet in the profile.
    """
    if len(replies) == 1:
        [r] = replies
        return Summary(str(ranks.get(r.subnet, -1)), r.accuracy, r.latency_ms, r.queue_ms, r.met_slo)
    return Summary(
        ",".join(str(ranks.get(r.subnet, -1)) for r in replies),
        min(r.accuracy for r in replies),
        max(r.latency_ms for r in replies),
        max(r.queue_ms for r in replies),
        all(r.met_slo for r in replies),
    )


def output(wanted: Wanted, replies: Sequence[Reply], ranks: Mapping[Subnet, int]) -> OutputTensor:
    """One output for all rows. See `summary` for the arguments.

    Raises RequestError if the request asks for classes, but the output has none.

    >>> made = [Reply(np.float32([0.1, 0.9]), Subnet((1,)), 0.7, True, 3.0, 1.0, 2.0, 4, ("cat", "dog"))]
    >>> output(Wanted("output", False, 1), made, {}).values
    ['0.899999976:1:dog']
    """
    if wanted.name != OUTPUT:
        values: list[Any] = [ranks.get(r.subnet, -1) if wanted.name == "subnet" else getattr(r, wanted.name) for r in replies]
        datatype = _FIELDS[wanted.name]
        return OutputTensor(wanted.name, datatype, [len(values)], np.array(values, tensors.DTYPES[datatype]))
    rows = stacked(replies)
    if wanted.classes:
        return _classification(wanted, rows, replies[0].class_names)
    return OutputTensor(OUTPUT, tensors.NAMES[rows.dtype], rows.shape, rows)


def stacked(replies: Sequence[Reply]) -> np.ndarray:
    """The outputs of all rows as one array (N, ...). Raises InferenceError if the protocol has no datatype for them."""
    try:
        rows = np.asarray(replies[0].output)[None] if len(replies) == 1 else np.stack([r.output for r in replies])
    except ValueError as e:
        raise errors.InferenceError(f"the outputs of the rows have different shapes ({e}); send one row in a request") from e
    if rows.dtype not in tensors.NAMES:
        raise errors.InferenceError(f"an engine returned an output of dtype {rows.dtype}, which the protocol does not have")
    return rows


def write(
    model: str, request: InferRequest, replies: Sequence[Reply], ranks: Mapping[Subnet, int]
) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if binary data follows, else None.

    Args:
      model: the model's name.
      request: the request.
      replies: one for each of its rows.
      ranks: the position of each subnet in the profile.
    """
    s = summary(replies, ranks)
    found, data = list[bytes](), list[bytes]()
    for wanted in request.wanted:
        name, datatype, shape, values = output(wanted, replies, ranks)
        start = f'{{"name":"{name}","datatype":"{datatype}","shape":{[*shape]},'.encode()
        if wanted.binary:
            data.append(tensors.to_bytes(values))
            found.append(b'%b"parameters":{"binary_data_size":%d}}' % (start, len(data[-1])))
        else:
            found.append(b'%b"data":%b}' % (start, tensors.to_json(values)))
    head = b'{"model_name":"%b","model_version":"1",%b"parameters":{%b},"outputs":[%b]}' % (
        model.encode(),
        b'"id":%b,' % msgspec.json.encode(request.id) if request.id else b"",
        b'"subnet":"%b","accuracy":%.6g,"latency_ms":%.3f,"queue_ms":%.3f,"met_slo":%b'
        % (s.subnet.encode(), s.accuracy, s.latency_ms, s.queue_ms, b"true" if s.met_slo else b"false"),
        b",".join(found),
    )
    return (b"".join((head, *data)), len(head)) if data else (head, None)


def _classification(wanted: Wanted, rows: np.ndarray, names: Sequence[str]) -> OutputTensor:
    """The most likely classes of each row, as texts `value:index` or `value:index:name`."""
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise RequestError("output 'output' has no classes, since it is no vector of logits; leave out `classification`")
    count = min(wanted.classes, rows.shape[1])
    order = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    texts = [
        f"{row[i]:.9g}:{i}" + (f":{names[i]}" if i < len(names) else "")
        for row, indices in zip(rows, order.tolist(), strict=True)
        for i in indices
    ]
    return OutputTensor(OUTPUT, "BYTES", [len(rows), count], texts)
