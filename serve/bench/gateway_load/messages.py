"""Requests of the load generator, made before a run, and the check of their answers after it.

Query i sends the number `i % NUMBERS` as the first value of its input. The servers that are measured answer with ten float32:
this number, and then nine times the rank of the subnet. So an answer that belongs to another query is seen.

The messages of gRPC are encoded and decoded by hand, in a few lines. So a mistake in the gateway's own messages is seen.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

NUMBERS = 100
OUTPUTS = 10
MODEL = "supernet"
PATH = f"/v2/models/{MODEL}/infer"
GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
DATATYPES = {"int32": "INT32", "uint8": "UINT8", "float32": "FP32"}


class Answer(NamedTuple):
    """What an answer says.

    Args:
      number: the first output; NaN if nothing is known about outputs.
      rank: the second output, the rank of the subnet.
      subnet: the rank of the subnet by the answer's parameters; NaN for a peer.
      accuracy: the accuracy by the answer's parameters; NaN for a peer.
    """

    number: float
    rank: float
    subnet: float = math.nan
    accuracy: float = math.nan


class Input(NamedTuple):
    """The input of the served model: its shape without the batch, and its dtype, a key of `DATATYPES`."""

    shape: tuple[int, ...] = (1,)
    dtype: str = "int32"

    def array(self, number: int) -> np.ndarray:
        """A batch of one input that begins with `number`. The other values are random, but the same in each run."""
        made = np.random.default_rng(number).integers(0, 256, (1, *self.shape)).astype(self.dtype)
        made.flat[0] = number
        return made


SMALL, IMAGE = Input(), Input((32, 32, 1), "uint8")


# -- HTTP ---------------------------------------------------------------------------------------------------------------------


def http(body: bytes, path: str = PATH, *, headers: Sequence[str] = ("Content-Type: application/json",)) -> bytes:
    """A POST request of HTTP/1.1."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode() + body


def json_request(given: Input, number: int, slo_ms: float) -> bytes:
    """A request with the input as JSON."""
    x = given.array(number)
    tensor = {"name": "input", "shape": x.shape, "datatype": DATATYPES[given.dtype], "data": x.ravel().tolist()}
    return http(json.dumps({"inputs": [tensor], "parameters": {"slo_ms": slo_ms}}, separators=(",", ":")).encode())


def binary_request(given: Input, number: int, slo_ms: float, path: str = PATH) -> bytes:
    """A request with a binary input, which also asks for a binary output."""
    x = given.array(number)
    tensor = {
        "name": "input",
        "shape": x.shape,
        "datatype": DATATYPES[given.dtype],
        "parameters": {"binary_data_size": x.nbytes},
    }
    parameters = {"slo_ms": slo_ms, "binary_data_output": True}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}, separators=(",", ":")).encode()
    return http(head + x.tobytes(), path, headers=(f"Inference-Header-Content-Length: {len(head)}",))


def peer_request(path: str, number: int) -> bytes:
    """A request to one of the peers, whose body is a small JSON of its own."""
    return http(json.dumps({"x": number}).encode(), path)


def read_http(raw: bytes) -> Answer:
    """Reads an answer of the gateway. Raises ValueError, KeyError, TypeError or IndexError for any other answer."""
    head, body = split(raw)
    if b"inference-header-content-length:" not in head.lower():
        content = json.loads(body)
        return _answer(content, content["outputs"][0]["data"])
    length = int(head.lower().split(b"inference-header-content-length:")[1].split(b"\r\n")[0])
    return _answer(json.loads(body[:length]), np.frombuffer(body[length:], "<f4"))


def read_any(raw: bytes) -> Answer:
    """Reads an answer of the gateway with any binary outputs, of which nothing is known. Raises as `read_http`."""
    head, body = split(raw)
    length = int(head.lower().split(b"inference-header-content-length:")[1].split(b"\r\n")[0])
    return Answer(math.nan, math.nan, accuracy=json.loads(body[:length])["parameters"]["accuracy"])


def read_peer(raw: bytes) -> Answer:
    """Reads an answer of a peer: a list of outputs as JSON. Raises as `read_http`."""
    outputs = json.loads(split(raw)[1])
    return Answer(outputs[0], _same(outputs))


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Head and body of a response with status 200. Raises ValueError for another status."""
    head, end, body = raw.partition(b"\r\n\r\n")
    if not end or head.split(b" ", 2)[1] != b"200":
        raise ValueError(f"expected status 200, got {raw[:300]!r}")
    if b"\r\ntransfer-encoding: chunked" in head.lower():
        body = body.partition(b"\r\n")[2].rpartition(b"\r\n0\r\n\r\n")[0]  # peers send one chunk
    return head, body


def _answer(content: dict, outputs: Sequence[float] | np.ndarray) -> Answer:
    parameters = content["parameters"]
    return Answer(float(outputs[0]), _same(outputs), float(parameters["subnet"]), parameters["accuracy"])


def _same(outputs: Sequence[float] | np.ndarray) -> float:
    """The value of all outputs but the first. Raises ValueError if they differ."""
    if len(outputs) != OUTPUTS or len({*map(float, outputs[1:])}) != 1:
        raise ValueError(f"expected {OUTPUTS} outputs, all but the first one equal, got {outputs}")
    return float(outputs[1])


# -- gRPC ---------------------------------------------------------------------------------------------------------------------


def grpc_request(given: Input, number: int, slo_ms: float) -> bytes:
    """The message of ModelInferRequest with `raw_input_contents`, without gRPC's five bytes in front of it."""
    x = given.array(number)
    shape = b"".join(varint(n) for n in x.shape)
    tensor = field(1, b"input") + field(2, DATATYPES[given.dtype].encode()) + field(3, shape)
    slo = field(1, b"slo_ms") + field(2, b"\x21" + struct.pack("<d", slo_ms))  # field 4 of InferParameter, a double
    return field(1, MODEL.encode()) + field(4, slo) + field(5, tensor) + field(7, x.tobytes())


def read_grpc(raw: bytes) -> Answer:
    """Reads a ModelInferResponse with gRPC's five bytes in front of it. Raises as `read_http`, and struct.error."""
    compressed, length = struct.unpack_from(">?I", raw)
    if compressed or length != len(raw) - 5:
        raise ValueError(f"expected one message that is not compressed, got {raw[:50]!r}")
    return read_grpc_message(raw[5:])


def read_grpc_message(message: bytes) -> Answer:
    """Reads a ModelInferResponse. Raises as `read_grpc`."""
    parameters, outputs = {}, b""
    for number, value in fields(message):
        if number == 4:
            entry = dict(fields(value))
            [parameters[bytes(entry[1]).decode()]] = dict(fields(entry[2])).values()
        elif number == 6:
            outputs = bytes(value)
    [accuracy] = struct.unpack("<d", parameters["accuracy"])
    found = np.frombuffer(outputs, "<f4")
    return Answer(float(found[0]), _same(found), float(bytes(parameters["subnet"])), accuracy)


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field of a message of protobuf. A whole number comes as the bytes of its varint.

    >>> list(fields(field(7, b"abc")))
    [(7, b'abc')]
    """
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind, start = tag & 7, at
        if kind == 0:
            _, at = _read_varint(message, at)
        elif kind == 2:
            length, start = _read_varint(message, at)
            at = start + length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"field {tag >> 3} has the wire type {kind}, expected 0, 1, 2 or 5")
        yield tag >> 3, message[start:at]


def field(number: int, content: bytes) -> bytes:
    """A field of a message of protobuf that has bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """A whole number from 0 up as a varint of protobuf."""
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


READERS: dict[str, Callable[[bytes], Answer]] = {"json": read_http, "binary": read_http, "grpc": read_grpc}
REQUESTS: dict[str, Callable[[Input, int, float], bytes]] = {
    "json": json_request,
    "binary": binary_request,
    "grpc": grpc_request,
}
