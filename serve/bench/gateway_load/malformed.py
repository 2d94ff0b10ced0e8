"""Malformed requests of HTTP, made by number: the same seed, kind and number give the same bytes.

One file because all kinds share the valid requests and the odd values. `KINDS` has a function for each kind.
"""

import copy
import dataclasses
import gzip
import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
    *("", " ", "0", "1", "-1", "+1", "1.5", "1e3", "1e400", "1e-400", "nan", "inf", "0x10", "٣", "1, 2", "1 2", "9" * 30, "9" * 5000),
    *("18446744073709551616", "chunked", "chunked, chunked", "gzip, chunked", "identity", "xchunked", "gzip", "deflate", "br"),
    *("gzip, gzip", "gzip;q=0", "gzip;q=a", "*;q=0", "application/json", "text/plain; version=a", "text/plain; version=9.9.9"),
    *("application/openmetrics-text; version=a", "application/octet-stream", "close", "keep-alive", "upgrade", "100-continue"),
    *("h2c", "websocket", "Bearer", "Bearer ", "Bearer x", "Basic Og==", "localhost", "a b", "\x00", "\x7f", "\xff", "x" * 9000),
    *("00-" + "0" * 32 + "-" + "0" * 16 + "-00", "bytes=0-", "\t", ";;;===", '"', "=" * 100, "a\r\n b", "a\nb: c", "\r"),
)
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PRI", "get", "X" * 300, "", "P\0ST")
PATHS = (
    *(PATH, "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/repository/index", "/metrics", "/"),
    *("/v2/models/supernet", "/v2/models/supernet/config", "/v2/models/supernet/ready", "/v2/models/supernet/versions/2/infer"),
    *("/v2/models/supernet/stats", "/v2/models//infer", "/v2/models/%00/infer", "/v2/models/%ff%fe/infer", "/events", "*"),
    *("/v2/models/../../etc/passwd", "/v2/models/supernet/infer?x=" + "y" * 3000, "/v2/models/%2e%2e/infer", "//", "/%", "/%zz"),
    *("http://localhost/v2", "http://[::1/v2", "localhost:80", "/" + "a" * 9000, "/\x00", "/\xff", "/v2 /v2", "", "?", "#", "/v2#x"),
    *("/v2/repository/models/x/load", "/v2/repository/models/..%2f..%2fetc/load", "/v2/models/supernet/versions//infer"),
)
VERSIONS = ("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/3", "HTTP/1.10", "http/1.1", "HTTP/", "", "ICY/1.1", "HTTP/1.1 x")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a client does on one connection.

    Args:
      steps: bytes to send, and seconds to wait.
      numbers: the first requests are valid. They must be answered in order, with these first values.
      answers: how many answers must come; None if that is open.
      leaves: the client closes the connection after the last step, or resets it. None: it waits for an answer first.
      is_head: whether the request may be a HEAD, whose answer has no body.
    """

    steps: Sequence[bytes | float]
    numbers: Sequence[int] = ()
    answers: int | None = None
    leaves: Literal["closes", "resets"] | None = None
    is_head: bool = False


def make(kind: str, number: int, seed: int) -> Attempt:
    """The attempt of a kind and a number."""
    return KINDS[kind](random.Random(f"{seed} {kind} {number}"))


# -- parts of requests --------------------------------------------------------------------------------------------------------


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
    head = "\r\n".join((f"{method} {path} {version}".rstrip(), "Host: x", *lines, *length, "", ""))
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
            case 1:
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


# -- kinds --------------------------------------------------------------------------------------------------------------------


def headers(rng: random.Random) -> Attempt:
    """Odd headers, also repeated ones, very long ones, and very many."""
    body, length = binary(rng) if rng.random() < 0.5 else (dumped(content(rng)), None)
    lines = [] if length is None else [f"Inference-Header-Content-Length: {length}"]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 20))):
        line = f"{rng.choice(HEADERS)}{rng.choice((':', ': ', ' : ', ''))}{rng.choice(VALUES)}"
        lines.insert(rng.randint(0, len(lines)), line)
    if rng.random() < 0.02:
        lines += ["x: " + "y" * rng.choice((10_000, 70_000, 300_000))]
    if rng.random() < 0.02:
        lines += [f"x{i}: y" for i in range(rng.choice((100, 1_000, 20_000)))]
    path = rng.choice((PATH, PATH, PATH, "/metrics", "/v2"))
    return Attempt(cut(rng, request(body, *lines, path=path, method="POST" if path == PATH else "GET")))


def lines(rng: random.Random) -> Attempt:
    """Odd methods, paths and versions."""
    method = rng.choice(METHODS)
    body = dumped(content(rng)) if rng.random() < 0.5 else b""
    sent = request(body, method=method, path=rng.choice(PATHS), version=rng.choice(VERSIONS))
    return Attempt(cut(rng, sent), is_head=method == "HEAD")


def values(rng: random.Random) -> Attempt:
    """JSON with odd values, without some of its fields, or with others."""
    body = dumped(changed(rng, content(rng)))
    if rng.random() < 0.05:
        body = rng.choice((b"[" * 100_000, b'{"inputs":' * 5_000, b"", b"null", b'"' + b"\\" * 999, b"\xef\xbb\xbf" + body))
    return Attempt(cut(rng, request(body)), answers=1)


def damage(rng: random.Random) -> Attempt:
    """A valid request of which some bytes are damaged, in the head or the body."""
    body, length = binary(rng)
    sent = request(body, f"Inference-Header-Content-Length: {length}") if rng.random() < 0.5 else request(dumped(content(rng)))
    return Attempt(cut(rng, damaged(rng, sent)))


def tensors(rng: random.Random) -> Attempt:
    """Shapes, datatypes, data and sizes that do not fit each other."""
    made = content(rng)
    tensor = made["inputs"][0]
    big = (-1, 0, 1, 2, 3, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 10**30)
    if rng.random() < 0.7:
        tensor["shape"] = [rng.choice(big) for _ in range(rng.choice((0, 1, 2, 3, 3, 3, 4, 9, 1_000)))]
    if rng.random() < 0.4:
        tensor["datatype"] = rng.choice(("BOOL", "UINT8", "INT8", "FP16", "FP32", "FP64", "BYTES", "BF16", "uint8", "", "é"))
    data = b""
    match rng.randrange(4):
        case 0:
            tensor["data"] = [rng.choice(ODD) for _ in range(rng.choice((0, 1, 4, 8, 300)))]
        case 1:
            data = rng.randbytes(rng.choice((0, 1, 3, 4, 5, 8, 12, 1_000)))
            tensor["parameters"] = {"binary_data_size": rng.choice((len(data), *big, None, "4", 1.0))}
            if rng.random() < 0.7:
                del tensor["data"]
        case 2:
            made["inputs"] *= rng.choice((0, 2, 3, 500))
        case _:
            pass
    head = dumped(made)
    said = rng.choice((len(head), len(head), len(head), 0, len(head) - 1, len(head) + len(data) + 1, 10**17))
    sent = request(head + data, *([f"Inference-Header-Content-Length: {said}"] if data or rng.random() < 0.3 else []))
    return Attempt(cut(rng, sent), answers=1)


def parameters(rng: random.Random) -> Attempt:
    """Odd values of the parameters of a request, of its outputs, and of the deadline in headers."""
    made = content(rng)
    names = ("slo_ms", "min_accuracy", "timeout", "priority", "binary_data_output", "sequence_id", "classification", "x")
    made["parameters"] = {name: rng.choice(ODD) for name in rng.sample(names, rng.randint(1, 4))}
    if rng.random() < 0.5:
        wanted = ("output", "subnet", "accuracy", "latency_ms", "queue_ms", "met_slo", "x", "")
        each = ("classification", "binary_data", "shared_memory_region", "x")
        made["outputs"] = [
            {"name": rng.choice(wanted), "parameters": {rng.choice(each): rng.choice((*ODD, 1, 2, 3))}}
            for _ in range(rng.choice((1, 2, 5, 400)))
        ]
    more = [f"{name}: {rng.choice(VALUES[:18])}" for name in ("X-SLO-Ms", "x-slo-ttft-ms") if rng.random() < 0.2]
    return Attempt(cut(rng, request(dumped(made), *(line.encode().decode("latin-1") for line in more))), answers=1)


def sizes(rng: random.Random) -> Attempt:
    """Bodies that are too long, claimed or sent, and requests with very many elements."""
    match rng.randrange(6):
        case 0:
            return Attempt([request(b"").replace(b"Length: 0", b"Length: %d" % rng.choice((1 << 26, 1 << 40, 10**18)))])
        case 1:
            return Attempt([request(bytes(rng.choice((SPLIT - 1, SPLIT, SPLIT + 1, 300_000))))], answers=1)
        case 2:
            head, body = request(b"", "Transfer-Encoding: chunked"), b"%x\r\n%b\r\n" % (100_000, b" " * 100_000)
            return Attempt([head, *[body] * rng.choice((1, 3, 20)), b"0\r\n\r\n"], answers=1)
        case 3:
            made = content(rng)
            made[rng.choice(("inputs", "outputs"))] = [{}] * rng.choice((1_000, 100_000))
            return Attempt([request(dumped(made))], answers=1)
        case 4:
            made = content(rng)
            made["inputs"][0]["data"] = rng.choice(([[]], [0], [0.5], ["x"])) * rng.choice((1_000, 200_000))
            return Attempt([request(dumped(made))], answers=1)
        case _:
            rows = rng.choice((1_000, 5_000))
            x = bytes(4 * rows)
            tensor = {"name": "input", "shape": [rows, 2, 2], "datatype": "UINT8", "parameters": {"binary_data_size": len(x)}}
            head = dumped({"inputs": [tensor], "parameters": {"slo_ms": 1}})
            return Attempt([request(head + x, f"Inference-Header-Content-Length: {len(head)}")], answers=1)


def codings(rng: random.Random) -> Attempt:
    """Compressed bodies: bombs, damaged ones, and other codings than their header says."""
    body = dumped(content(rng))
    match rng.randrange(6):
        case 0:
            made = bomb(rng.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 70)))
        case 1:
            made = damaged(rng, gzip.compress(body, mtime=0))
        case 2:
            made = gzip.compress(body, mtime=0)[: rng.randrange(40)]
        case 3:
            made = gzip.compress(body, mtime=0) + gzip.compress(body, mtime=0)
        case 4:
            made = gzip.compress(gzip.compress(body, mtime=0), mtime=0)
        case _:
            made = rng.choice((zlib.compress(body), zlib.compress(body)[2:-4], body, b"", rng.randbytes(100)))
    coding = rng.choice(("gzip", "gzip", "gzip", "deflate", "x-gzip", "br", "gzip, gzip", "identity", "GZIP", "", "é"))
    return Attempt(cut(rng, request(made, f"Content-Encoding: {coding}")), answers=1)


def bomb(megabytes: int) -> bytes:
    """A small body of gzip that becomes a large one."""
    if megabytes not in _bombs:
        _bombs[megabytes] = gzip.compress(b"[" * (megabytes << 20), 6, mtime=0)
    return _bombs[megabytes]


_bombs: dict[int, bytes] = {}


def chunks(rng: random.Random) -> Attempt:
    """Chunked bodies with wrong sizes, extensions and trailers."""
    body = dumped(content(rng))
    sizes = ("%x" % len(body), "0", "-1", "+5", "0x5", "ffffffffffffffffff", "", "g", "5 ", "%x;x=y" % len(body), "%x;" % len(body))
    sent = f"{rng.choice(sizes)}{rng.choice((chr(13) + chr(10), chr(10), chr(13)))}".encode() + body
    sent += rng.choice((b"\r\n0\r\n\r\n", b"\r\n0\r\n", b"0\r\n\r\n", b"\r\n", b"\r\n0\r\nX-SLO-Ms: 1e-6\r\n\r\n", b"\r\n0\r\nx\r\n\r\n"))
    lines = [rng.choice(("Transfer-Encoding: chunked", "transfer-encoding:chunked", "Transfer-Encoding: chunked, chunked"))]
    if rng.random() < 0.2:
        lines.append(f"Content-Length: {rng.choice(('0', str(len(sent)), 'x'))}")
    return Attempt(cut(rng, request(sent, *lines)))


def truncated(rng: random.Random) -> Attempt:
    """A valid request that ends in the middle, since its client goes away."""
    sent = valid(rng)[0]
    if rng.random() < 0.1:
        sent = request(bytes(200_000))
    steps: list[bytes | float] = [*cut(rng, sent[: rng.randrange(len(sent))])]
    if rng.random() < 0.1:
        steps.append(0.02)
    return Attempt(steps, leaves=rng.choice(("closes", "resets")))


def deserted(rng: random.Random) -> Attempt:
    """Valid requests whose client goes away before their answers, or reads none of them."""
    sent = [valid(rng)[0] for _ in range(rng.choice((1, 1, 2, 20)))]
    return Attempt([b"".join(sent), rng.choice((0.0, 0.001, 0.01))], leaves=rng.choice(("closes", "resets")))


def slow(rng: random.Random) -> Attempt:
    """A valid request in many small pieces with pauses, which is answered, or whose client gives up."""
    sent, number = valid(rng)
    size = rng.choice((1, 7, 40))
    pieces: list[bytes | float] = []
    for at in range(0, len(sent), size):
        pieces += [sent[at : at + size], rng.choice((0.0, 0.002))]
    if rng.random() < 0.3:
        return Attempt(pieces[: rng.randrange(len(pieces))], leaves=rng.choice(("closes", "resets")))
    return Attempt(pieces, numbers=[number], answers=1)


def pipelines(rng: random.Random) -> Attempt:
    """Valid requests and then garbage, in one packet or several. The valid ones must be answered first."""
    made = [valid(rng) for _ in range(rng.choice((1, 1, 2, 3, 8)))]
    garbage = rng.choice((b"\0\xff" * 20, b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"{}\r\n\r\n", rng.randbytes(50) + b"\r\n\r\n"))
    sent = b"".join(data for data, _ in made) + garbage
    return Attempt(cut(rng, sent), numbers=[number for _, number in made])


def garbage(rng: random.Random) -> Attempt:
    """Bytes that are no HTTP at all."""
    tls = bytes.fromhex("16030100c8010000c40303") + rng.randbytes(190)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(30)
    sent = rng.choice((rng.randbytes(rng.randint(1, 2_000)), tls, preface, b"\r\n" * 500, b"\n", b"\0" * 100, b"GET / HTTP/1.1"))
    return Attempt(cut(rng, sent))


KINDS: dict[str, Callable[[random.Random], Attempt]] = {
    function.__name__: function
    for function in (
        *(headers, lines, values, damage, tensors, parameters, sizes, codings, chunks, truncated, deserted, slow),
        *(pipelines, garbage),
    )
}
SHARES = {"sizes": 0.2, "slow": 0.3, "codings": 0.5}
"""The number of attempts of a kind, as a share of the others'."""
