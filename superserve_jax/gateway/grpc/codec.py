"""Inference over gRPC: from messages to the requests that HTTP has, and from replies to messages. No sockets.

A message has the fields of a JSON body with a binary tensor (see `gateway.requests`): names, shapes, parameters, and the bytes
of the input. So this module only renames them, and all checks are in `gateway.requests`.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from superserve_jax.gateway import replies, tensors
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import messages
from superserve_jax.gateway.model import VERSION, ServedModel
from superserve_jax.gateway.requests import InferRequest
from superserve_jax.serving.futures import Reply

_Response = messages.named("inference.ModelInferResponse")

# The field of InferTensorContents for each datatype. FP16 has none.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_MOST = 100  # inputs, outputs, dimensions or parameters; far more than any request needs


def read(model: ServedModel, message: Any) -> InferRequest:
    """Reads a ModelInferRequest.

    Raises RequestError if it does not follow the protocol, or does not fit the model.
    """
    inputs = [
        {
            "name": given.name,
            "datatype": given.datatype,
            "shape": [*_some(given.shape)],
            "parameters": _plain(given.parameters),
        }
        for given in _some(message.inputs)
    ]
    data = b""
    if inputs:
        data = _data(message, inputs[0]["datatype"])
        inputs[0]["parameters"]["binary_data_size"] = len(data)
    outputs = [{"name": wanted.name, "parameters": _plain(wanted.parameters)} for wanted in _some(message.outputs)]
    fields = {"id": message.id, "inputs": inputs, "outputs": outputs, "parameters": _plain(message.parameters)}
    return model.read_fields(fields, data)


def write(model: ServedModel, request: InferRequest, made: Sequence[Reply]) -> Any:
    """The ModelInferResponse to a request.

    Args:
      model: the model.
      request: the request.
      made: one reply for each of its rows.
    """
    ranks = model.ranks()
    s = replies.summary(made, ranks)
    response = _Response(model_name=model.name, model_version=VERSION, id=request.id)
    parameters = response.parameters
    parameters["subnet"].string_param = s.subnet
    parameters["accuracy"].double_param = s.accuracy
    parameters["latency_ms"].double_param = s.latency_ms
    parameters["queue_ms"].double_param = s.queue_ms
    parameters["met_slo"].bool_param = s.met_slo
    for wanted in request.wanted:
        name, datatype, shape, values = replies.output(wanted, made, ranks)
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(tensors.to_bytes(values))
    return response


def _some(repeated: Any) -> Any:
    """The elements of a repeated field. Raises RequestError if there are very many."""
    if len(repeated) > _MOST:
        raise RequestError(f"{len(repeated)} inputs, outputs, dimensions or parameters; send at most {_MOST}")
    return repeated


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain values."""
    made = dict[str, Any]()
    for name in _some(parameters):
        parameter = parameters[name]
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise RequestError(f"parameter '{name[:100]}' has no value; set one of its fields, such as int64_param")
        value = getattr(parameter, kind)
        made[name] = msgspec.Raw(b"0") if name == "shared_memory_region" else value  # `requests` refuses any value of it
    return made


def _data(message: Any, datatype: str) -> bytes:
    """The bytes of the first input, from raw_input_contents or from the typed contents."""
    typed = [field.name for field, _ in message.inputs[0].contents.ListFields()]
    raw = message.raw_input_contents
    if len(raw) > 0:
        if typed or len(raw) != len(message.inputs):
            raise RequestError(
                f"{len(raw)} raw_input_contents and {typed or 'no'} contents came for {len(message.inputs)} inputs; "
                "send raw_input_contents for each input, and no contents"
            )
        return raw[0]
    expected = _CONTENTS.get(datatype)
    if not typed or (expected is None and datatype not in tensors.DTYPES):  # `requests` says what is wrong
        return b""
    if typed != [expected]:
        raise RequestError(f"the contents are {typed}, expected {expected or 'raw_input_contents'} for datatype {datatype}")
    values = getattr(message.inputs[0].contents, typed[0])
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    dtype, array = tensors.DTYPES[datatype], np.array(values)
    narrow = array.astype(dtype)
    if not np.array_equal(narrow, array, equal_nan=True):
        wrong = array[narrow != array][0]
        raise RequestError(f"the contents have {wrong}, which does not fit {datatype}; values are not converted")
    return narrow.tobytes()
