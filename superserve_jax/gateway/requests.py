"""Requests for inference: from the body of a request to arrays and parameters. No sockets.

A body has one of three forms:

- JSON alone;
- JSON with `binary_data_size` in its input, and the bytes of the input behind it (the extension `binary_tensor_data`). The
  header Inference-Header-Content-Length tells where the JSON ends;
- the bytes of one input alone, if that header is 0.

msgspec checks the types of all fields, and converts none: true is no number, and 1.0 is no whole number.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from superserve_jax import errors
from superserve_jax.gateway import tensors
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.tensors import InputTensor

OUTPUT = "output"
"""The name of every model's output."""
OUTPUTS = (OUTPUT, "subnet", "accuracy", "latency_ms", "queue_ms", "met_slo")
"""The outputs that a request may name. All but the first are fields of `serving.Reply`, with one value per input."""

_MOST_ID = 1000  # characters of a request's id
_SHORT_TEXTS = 2000  # characters; to split more of them into tokens would keep other clients waiting
_NUMBER = re.compile(rb"\d+(\.\d*)?([eE][+-]?\d{1,3})?")
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
# Lists of a request are short. The JSON before binary data is short, too.
_MOST_JSON = 64 << 10
_LARGE, _MOST_OBJECTS = 1 << 20, 10_000  # a body above so many bytes may have so many objects; each takes memory


class Parameters(msgspec.Struct, gc=False):
    """The parameters of a request that have an effect. Others are ignored, as the protocol asks.

    Args:
      slo_ms: the deadline, in milliseconds from when the request has been read.
      min_accuracy: the lowest accuracy that the client accepts, a fraction of 1.
      timeout: the deadline in microseconds, if there is no `slo_ms`. 0 means no deadline.
      priority: accepted and ignored, since queries are served in the order of their deadlines.
      binary_data_output: whether outputs are binary, unless they say so themselves.
    """

    slo_ms: float | None = None
    min_accuracy: float = 0.0
    timeout: _Count = 0
    priority: _Count = 0
    binary_data_output: bool = False

    def deadline_ms(self) -> float | None:
        """The deadline in milliseconds, or None for a request without one."""
        if self.slo_ms is not None:
            return self.slo_ms
        return 1e-3 * self.timeout if self.timeout else None


_NO_DATA = msgspec.Raw()


class _InputParameters(msgspec.Struct, gc=False):
    binary_data_size: _Count | None = None
    shared_memory_region: msgspec.Raw = _NO_DATA


class _OutputParameters(msgspec.Struct, gc=False):
    binary_data: bool | None = None
    classification: _Count = 0
    shared_memory_region: msgspec.Raw = _NO_DATA


class _Input(msgspec.Struct, gc=False):
    name: str
    shape: Annotated[list[int], msgspec.Meta(max_length=8)]
    datatype: str
    data: msgspec.Raw = _NO_DATA
    parameters: _InputParameters | None = None


class _Output(msgspec.Struct, gc=False):
    name: str
    parameters: _OutputParameters | None = None


class _Body(msgspec.Struct, gc=False):
    inputs: Annotated[list[_Input], msgspec.Meta(max_length=16)]
    id: str = ""
    parameters: Parameters | None = None
    outputs: Annotated[list[_Output], msgspec.Meta(max_length=16)] = []


class Wanted(NamedTuple):
    """An output that a request asks for.

    Args:
      name: one of `OUTPUTS`.
      binary: whether its data is binary, not JSON.
      classes: number of top classes to return; 0 returns the logits.
    """

    name: str
    binary: bool
    classes: int


class InferRequest(NamedTuple):
    """A request for inference, checked.

    Args:
      rows: the inputs, an array (N, ...), or N lists of texts.
      id: the client's id of the request; "" for none.
      slo_ms: the deadline in milliseconds; None for a request without one.
      min_accuracy: the lowest accuracy that the client accepts.
      wanted: the outputs to send.
    """

    rows: "np.ndarray | list[list[str]]"
    id: str
    slo_ms: float | None
    min_accuracy: float
    wanted: Sequence[Wanted]

    def has_long_texts(self) -> bool:
        """Whether its texts must be encoded in another thread than that of the event loop."""
        rows = self.rows
        return isinstance(rows, list) and sum(len(text) for row in rows for text in row) > _SHORT_TEXTS


_decode = msgspec.json.Decoder(_Body).decode
_NO_PARAMETERS, _NO_INPUT_PARAMETERS, _NO_OUTPUT_PARAMETERS = Parameters(), _InputParameters(), _OutputParameters()
_DEFAULT = {binary: (Wanted(OUTPUT, binary, 0),) for binary in (False, True)}


def read(body: bytes, json_length: int | None, tensor: InputTensor) -> InferRequest:
    """Reads the body of a request for inference.

    Args:
      body: the body, inflated.
      json_length: JSON length in bytes, from Inference-Header-Content-Length; 0: the body is one raw input; None: no header.
      tensor: the input of the model.

    Raises RequestError if the body does not follow the protocol, or does not fit the model.

    >>> body = b'{"inputs": [{"name": "input", "shape": [1, 2], "datatype": "INT32", "data": [3, 4]}]}'
    >>> read(body, None, InputTensor((2,), np.dtype(np.int32))).rows.tolist()
    [[3, 4]]
    """
    whole = memoryview(body)
    rest = whole[:0]
    if json_length is not None:
        if json_length == 0:
            return InferRequest(_raw(body, tensor), "", None, 0.0, _DEFAULT[True])
        if json_length > len(body):
            raise RequestError(
                f"Inference-Header-Content-Length is {json_length}, but the body has {len(body)} bytes; "
                "give the length of the JSON in it"
            )
        whole, rest = whole[:json_length], whole[json_length:]
        if rest and json_length > _MOST_JSON:
            raise RequestError(
                f"the JSON before the binary data has {json_length:,} bytes, at most {_MOST_JSON:,} are possible"
            )
    if len(whole) > _LARGE and body.count(b"{", 0, len(whole)) > _MOST_OBJECTS:
        raise RequestError(f"the JSON has more than {_MOST_OBJECTS:,} objects; send fewer outputs and parameters")
    try:
        request = _decode(whole)
    except tensors.MALFORMED as e:
        hint = " (binary data needs the header Inference-Header-Content-Length)" if json_length is None else ""
        raise RequestError(
            f"the body is not an inference request: {errors.one_line(e)[:300]}{hint}; see docs/network.md"
        ) from e
    return _checked(request, rest, tensor)


def from_fields(fields: Mapping[str, Any], data: bytes, tensor: InputTensor) -> InferRequest:
    """A request whose fields came in another form than JSON, such as a message of gRPC.

    Args:
      fields: the fields, with the names and types that they have in JSON. The input has `binary_data_size`.
      data: the bytes of the input.
      tensor: the input of the model.

    Raises RequestError as `read`.

    >>> given = {"name": "input", "shape": [1, 2], "datatype": "UINT8", "parameters": {"binary_data_size": 2}}
    >>> from_fields({"inputs": [given]}, b"\3\4", InputTensor((2,), np.dtype(np.uint8))).rows.tolist()
    [[3, 4]]
    """
    try:
        request = msgspec.convert(fields, _Body)
    except msgspec.MsgspecError as e:
        raise RequestError(f"this is not an inference request: {errors.one_line(e)[:300]}; see docs/network.md") from e
    return _checked(request, memoryview(data), tensor)


def json_length(headers: Mapping[bytes, bytes]) -> int | None:
    """The value of the header Inference-Header-Content-Length. Raises RequestError unless it is a whole number."""
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise RequestError(f"Inference-Header-Content-Length is {_shown(value)}, expected the length of the JSON in bytes")
    return int(value)


def slo_of(headers: Mapping[bytes, bytes]) -> float | None:
    """The SLO in a header, in milliseconds: X-SLO-Ms, or else x-slo-ttft-ms. None without them.

    >>> slo_of({b"x-slo-ms": b"20"}), slo_of({b"x-slo-ttft-ms": b"7.5"}), slo_of({})
    (20.0, 7.5, None)
    """
    name = "X-SLO-Ms"
    value = headers.get(b"x-slo-ms")
    if value is None:
        name = "x-slo-ttft-ms"
        value = headers.get(b"x-slo-ttft-ms")
        if value is None:
            return None
    if len(value) > 30 or not _NUMBER.fullmatch(value):
        raise RequestError(f"{name} is {_shown(value)}, expected a number of milliseconds such as 36")
    return float(value)


def _checked(request: _Body, rest: memoryview, tensor: InputTensor) -> InferRequest:
    """The request, with the bytes that follow its fields."""
    if len(request.inputs) != 1:
        raise RequestError(f"the request has {len(request.inputs)} inputs, but every model takes one, named 'input'")
    if len(request.id) > _MOST_ID:
        raise RequestError(f"the id has {len(request.id)} characters; give at most {_MOST_ID}")
    parameters = request.parameters or _NO_PARAMETERS
    rows = _rows(request.inputs[0], rest, tensor)
    wanted: Sequence[Wanted] = _DEFAULT[parameters.binary_data_output]
    if request.outputs:
        wanted = _wanted(request.outputs, parameters.binary_data_output)
    return InferRequest(rows, request.id, parameters.deadline_ms(), parameters.min_accuracy, wanted)


def _raw(body: bytes, tensor: InputTensor) -> np.ndarray:
    """The batch of one input that is the whole body."""
    shape = [1, *tensor.shape]
    if tensor.any_length:
        each = tensor.dtype.itemsize * int(np.prod(tensor.shape[1:], dtype=int))
        if not body or len(body) % each:
            raise RequestError(f"the body has {len(body)} bytes, expected a multiple of {each}, the bytes of a token")
        shape[1] = len(body) // each
    return tensors.from_bytes(tensor, shape, body)


def _rows(given: _Input, rest: memoryview, tensor: InputTensor) -> "np.ndarray | list[list[str]]":
    if given.name != tensor.name:
        raise RequestError(f"unexpected input '{given.name[:100]}'; every model takes one, named '{tensor.name}'")
    is_text = given.datatype == "BYTES"
    if not is_text and given.datatype != tensor.datatype:
        also = " or BYTES" if tensor.texts else ""
        raise RequestError(
            f"input 'input' has datatype '{given.datatype[:20]}', expected {tensor.datatype}{also}; inputs are never cast"
        )
    parameters = given.parameters or _NO_INPUT_PARAMETERS
    if parameters.shared_memory_region is not _NO_DATA:
        raise RequestError("shared memory is not supported; send the data in the request")
    if parameters.binary_data_size is None:
        if given.data is _NO_DATA:
            raise RequestError("input 'input' has no data; send `data`, or `binary_data_size` and the bytes after the JSON")
        if rest:
            raise RequestError(f"{len(rest)} bytes follow the JSON, but input 'input' has no `binary_data_size`; give it")
        return (tensors.texts_from_json if is_text else tensors.from_json)(tensor, given.shape, given.data)
    if given.data is not _NO_DATA:
        raise RequestError("input 'input' has `data` and `binary_data_size`; send one of them")
    if parameters.binary_data_size != len(rest):
        raise RequestError(f"binary_data_size is {parameters.binary_data_size}, but {len(rest)} bytes follow the JSON")
    return (tensors.texts_from_bytes if is_text else tensors.from_bytes)(tensor, given.shape, rest)


def _wanted(outputs: Sequence[_Output], binary: bool) -> list[Wanted]:
    wanted = list[Wanted]()
    for output in outputs:
        if output.name not in OUTPUTS:
            raise RequestError(str(errors.unknown_name("output", output.name, OUTPUTS)))
        parameters = output.parameters or _NO_OUTPUT_PARAMETERS
        if parameters.shared_memory_region is not _NO_DATA:
            raise RequestError("shared memory is not supported; leave out `shared_memory_region`, and the reply has the data")
        if parameters.classification and output.name != OUTPUT:
            raise RequestError(f"output '{output.name}' has no classes; ask for the classification of 'output'")
        is_binary = binary if parameters.binary_data is None else parameters.binary_data
        wanted.append(Wanted(output.name, is_binary, parameters.classification))
    if len({output.name for output in wanted}) < len(wanted):
        raise RequestError("the request names an output twice; name each once")
    return wanted


def _shown(value: bytes) -> str:
    return repr(value[:50].decode("latin-1"))
