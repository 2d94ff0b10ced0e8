"""Odd values for malformed requests of HTTP, and the valid requests that they damage."""

import copy
import json
import random
from typing import Any

import numpy as np

from gateway_load.messages import PATH

IMAGE = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
"""The inputs of a valid request: the served model takes uint8 of shape (2, 2)."""
SHAPE, DTYPE = (2, 2), "uint8"
SPLIT = 65_536  # uvicorn's limit of what it reads ahead
LONG = "a number of 5,000 digits"
"""Stands for this number, which Python cannot write."""
ODD = (
    *(None, True, False, 0, -1, 1, 2, 3, 255, 256, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**12, 10**400, -(10**400), LONG),
    *(0.5, -0.5, 1.0, 1.5, 1e-320, 1e12, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "1", "nan", "input", "output", "UINT8", "BYTES", "FP32", "../../etc/passwd", "\0", "\ud800", "a\nb", "é" * 99),
    *([], [[]], [None], [0], [1, 2, 3], ["x"], [1e400], [[0, 1], [2, 3]], {}, {"a": {}}, {"name": "input"}, [{}] * 20),
)
HEADERS = (
    *("content-length", "transfer-encoding", "content-encoding", "content-type", "accept", "accept-encoding", "connection"),
    *("inference-header-content-length", "x-slo-ms", "x-slo-ttft-ms", "expect", "upgrade", "host", "authorization", "te"),
    *("traceparent", "keep-alive", "trailer", "range", "cookie", "x", "x-forwarded-for", "origin", "if-match", ""),
)
VALUES = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "+1",
        "1.5",
        "1e3",
        "1e400",
        "1e-400",
        "nan",
        "inf",
        "0x10",
        "٣",
        "1, 2",
        "1 2",
        "9" * 30,
        "9" * 5000,
    ),
    *("18446744073709551616", "chunked", "chunked, chunked", "gzip, chunked", "identity", "xchunked", "gzip", "deflate", "br"),
    *("gzip, gzip", "gzip;q=0", "gzip;q=a", "*;q=0", "application/json", "text/plain; version=a", "text/plain; version=9.9.9"),
    *("application/openmetrics-text; version=a", "application/octet-stream", "close", "keep-alive", "upgrade", "100-continue"),
    *(
        "h2c",
        "websocket",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Basic Og==",
        "localhost",
        "a b",
        "\x00",
        "\x7f",
        "\xff",
        "x" * 9000,
    ),
    *("00-" + "0" * 32 + "-" + "0" * 16 + "-00", "bytes=0-", "\t", ";;;===", '"', "=" * 100, "a\r\n b", "a\nb: c", "\r"),
)
METHODS = (
    "GET",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PATCH",
    "PRI",
    "get",
    "X" * 300,
    "",
    "P\0ST",
)
PATHS = (
    *(PATH, "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/repository/index", "/metrics", "/"),
    *(
        "/v2/models/supernet",
        "/v2/models/supernet/config",
        "/v2/models/supernet/ready",
        "/v2/models/supernet/versions/2/infer",
    ),
    *("/v2/models/supernet/stats", "/v2/models//infer", "/v2/models/%00/infer", "/v2/models/%ff%fe/infer", "/events", "*"),
    *(
        "/v2/models/../../etc/passwd",
        "/v2/models/supernet/infer?x=" + "y" * 3000,
        "/v2/models/%2e%2e/infer",
        "//",
        "/%",
        "/%zz",
    ),
    *(
        "http://localhost/v2",
        "http://[::1/v2",
        "localhost:80",
        "/" + "a" * 9000,
        "/\x00",
        "/\xff",
        "/v2 /v2",
        "",
        "?",
        "#",
        "/v2#x",
    ),
    *("/v2/repository/models/x/load", "/v2/repository/models/..%2f..%2fetc/load", "/v2/models/supernet/versions//infer"),
)
VERSIONS = (
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/0.9",
    "HTTP/2.0",
    "HTTP/3",
    "HTTP/1.10",
    "http/1.1",
    "HTTP/",
    "",
    "ICY/1.1",
    "HTTP/1.1 x",
)


def content(rng: random.Random, rows: int | None = None) -> dict[str, Any]:
    """The JSON of a valid request."""
    x = IMAGE[: rows or rng.randint(1, len(IMAGE))]
    tensor = {"name": "input", "shape": list(x.shape), "datatype": "UINT8", "data": x.tolist()}
    if rng.random() < 0.5:
        tensor["data"] = x.ravel().tolist()
    made: dict[str, Any] = {"inputs": [tensor], "id": "7", "parameters": {"slo_ms": 1000.0, "min_accuracy": 0.0}}
    if rng.random() < 0.5:
        made["outputs"] = [{"name": name, "parameters": {"binary_data": rng.random() < 0.5}} for name in ("output", "subnet")]
    return made


def dumped(value: Any) -> bytes:
    """JSON of any value, also of one that JSON cannot have."""
    return json.dumps(value).replace(f'"{LONG}"', "9" * 5_000).encode()


def binary(rng: random.Random) -> tuple[bytes, int]:
    """The body of a valid request with a binary input, and the length of its JSON."""
    made = content(rng)
    x = np.array(made["inputs"][0].pop("data"), np.uint8)
    made["inputs"][0]["parameters"] = {"binary_data_size": x.nbytes}
    head = dumped(made)
    return head + x.tobytes(), len(head)


def request(body: bytes, *lines: str, method: str = "POST", path: str = PATH, version: str = "HTTP/1.1") -> bytes:
    """A request with a body. Its length is among the headers, unless they have one of transfer-encoding."""
    length = () if any(line.lower().startswith("transfer-encoding") for line in lines) else (f"Content-Length: {len(body)}",)
    head = "\r\n".join((f"{method} {path} {version}".rstrip(), "Host: localhost", *lines, *length, "", ""))
    return head.encode("latin-1", "replace") + body


def valid(rng: random.Random) -> tuple[bytes, int]:
    """A valid request, and the first value of its first output."""
    number = rng.randrange(256)
    x = IMAGE[:1].copy()
    x.flat[0] = number
    tensor = {"name": "input", "shape": x.shape, "datatype": "UINT8", "data": x.ravel().tolist()}
    return request(dumped({"inputs": [tensor], "parameters": {"slo_ms": 10_000}})), number


def cut(rng: random.Random, data: bytes, most: int = 4) -> list[bytes]:
    """Data in one or a few pieces, as the network may deliver it."""
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, most)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes."""
    made = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        inside = made
        while True:
            if not isinstance(inside, dict | list) or not inside:
                return rng.choice(ODD)
            key = rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
            if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.4:
                break
            inside = inside[key]
        match rng.randrange(5):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, list):
                inside.insert(key, rng.choice(ODD))
            case 1 if isinstance(inside, dict):
                inside[rng.choice(("", "x", "data", "parameters", "shared_memory_region", "classification"))] = rng.choice(ODD)
            case _:
                inside[key] = copy.deepcopy(rng.choice(ODD))
    return made


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes of which a few are changed, removed, doubled or added."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(4):
            case 0:
                made[at : at + 1] = rng.randbytes(1)
            case 1:
                del made[at : at + rng.randint(1, 20)]
            case 2:
                made[at:at] = made[at : at + rng.randint(1, 30)]
            case _:
                made[at:at] = rng.choice((b"\r\n", b"\n", b"\0", b"\r\n\r\n", b" ", b"{", b"]", b"\xff\xfe", b"0\r\n\r\n"))
    return bytes(made)
