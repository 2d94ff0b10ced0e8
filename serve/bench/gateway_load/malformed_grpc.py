"""Malformed calls of gRPC, made by number: damaged HTTP/2, and messages that cannot be served.

`KINDS` has attempts of both sorts. An `Attempt` sends bytes of HTTP/2 by itself. A `Call` goes through the library grpcio, so
its frames are right, and its messages are not.
"""

import dataclasses
import random
import struct
from collections.abc import Callable, Sequence

from gateway_load import http2, odd
from gateway_load.malformed import Attempt
from gateway_load.messages import GRPC_PATH, MODEL, field, varint

SERVICE = "/inference.GRPCInferenceService/"
METHODS = (
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryRegister", "LogSettings", "X", ""),
)
OTHER_PATHS = (
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1.ServerReflection/X",
    "/",
    "x",
)
NUMBERS = (0, 1, 2, 3, 4, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # int64 of protobuf: the last two are negative


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that a client makes.

    Args:
      path: service and method.
      messages: the messages of requests; one, unless `streams`.
      streams: whether requests and answers are streams.
      timeout_s: the deadline of the call.
      metadata: metadata of the call.
    """

    path: str
    messages: Sequence[bytes]
    streams: bool = False
    timeout_s: float = 5.0
    metadata: Sequence[tuple[str, str]] = ()


def make(kind: str, number: int, seed: int) -> Attempt | Call:
    """The attempt of a kind and a number."""
    return KINDS[kind](random.Random(f"{seed} {kind} {number}"))


# -- messages -----------------------------------------------------------------------------------------------------------------


def infer(
    shape: Sequence[int] = (1, 2, 2),
    datatype: str = "UINT8",
    raw: Sequence[bytes] = (b"\1\2\3\4",),
    *,
    name: str = "input",
    more: bytes = b"",
    contents: bytes = b"",
) -> bytes:
    """A message for inference. The arguments of a valid one are the defaults."""
    tensor = field(1, name.encode()) + field(2, datatype.encode()) + field(3, b"".join(varint(n) for n in shape))
    tensor += field(5, contents) if contents else b""
    return field(1, MODEL.encode()) + more + field(5, tensor) + b"".join(field(7, data) for data in raw)


def parameter(name: str, value: bytes) -> bytes:
    """A parameter of a request, with the fields of its value."""
    return field(4, field(1, name.encode()) + field(2, value))


def tensors(rng: random.Random) -> Call:
    """Shapes, datatypes and data that do not fit each other."""
    shape = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 3, 3, 9, 500)))] if rng.random() < 0.6 else (1, 2, 2)
    datatype = rng.choice(("UINT8", "UINT8", "BOOL", "FP16", "FP32", "BYTES", "BF16", "", "é"))
    raw = [rng.randbytes(rng.choice((0, 1, 4, 4, 5, 8, 300))) for _ in range(rng.choice((0, 1, 1, 1, 2, 20)))]
    contents = b""
    if rng.random() < 0.4:  # bool, int, int64, uint, uint64, fp32, fp64, bytes
        numbers = b"".join(varint(rng.choice(NUMBERS)) for _ in range(rng.choice((1, 4, 8))))
        contents = field(rng.randint(1, 8), numbers)
    return Call(GRPC_PATH, [infer(shape, datatype, raw, name=rng.choice(("input", "input", "x", "")), contents=contents)])


def parameters(rng: random.Random) -> Call:
    """Odd parameters, outputs, deadlines and metadata."""
    doubles = (float("nan"), float("inf"), -1.0, 0.0, 1e308, 1e-320, 36.0)
    more = b""
    for _ in range(rng.choice((1, 1, 2, 50))):
        value = rng.choice(
            (
                b"",
                b"\x08" + varint(rng.choice((0, 1, 2))),
                b"\x10" + varint(rng.choice(NUMBERS)),
                field(3, rng.choice((b"", b"36", b"x" * 999, b"\xff"))),
                b"\x21" + struct.pack("<d", rng.choice(doubles)),
                b"\x28" + varint(rng.choice(NUMBERS)),
            )
        )
        more += parameter(rng.choice(("slo_ms", "timeout", "min_accuracy", "priority", "sequence_id", "x", "")), value)
    if rng.random() < 0.4:
        wanted = field(1, rng.choice((b"output", b"subnet", b"x", b"", b"\xff")))
        wanted += field(2, field(1, b"classification") + field(2, b"\x10" + varint(rng.choice(NUMBERS))))
        more += field(6, wanted) * rng.choice((1, 2, 300))
    keys, values = (
        ("x-slo-ms", "x-slo-ttft-ms", "authorization", "traceparent", "x"),
        ("", "x", "-1", "1e999", "nan", "36", "9" * 999),
    )
    metadata = [(rng.choice(keys), rng.choice(values)) for _ in range(rng.choice((0, 0, 1, 3)))]
    return Call(GRPC_PATH, [infer(more=more)], timeout_s=rng.choice((5.0, 5.0, 0.001, 1e-6)), metadata=metadata)


def messages(rng: random.Random) -> Call:
    """Damaged and random messages, to all calls."""
    sent = rng.choice(
        (odd.damaged(rng, infer()), rng.randbytes(rng.randrange(200)), b"", b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f")
    )
    if rng.random() < 0.05:
        sent = field(1, b"x" * rng.choice((100_000, 2_000_000)))  # the second one is over the limit
    return Call(rng.choice((GRPC_PATH, *(SERVICE + method for method in METHODS), *OTHER_PATHS)), [sent])


def streams(rng: random.Random) -> Call:
    """A stream of valid and damaged requests."""
    made = [infer() if rng.random() < 0.6 else odd.damaged(rng, infer()) for _ in range(rng.choice((0, 1, 3, 30)))]
    return Call(rng.choice((SERVICE + "ModelStreamInfer", SERVICE + "ModelStreamInfer", GRPC_PATH)), made, streams=True)


# -- HTTP/2 -------------------------------------------------------------------------------------------------------------------


def valid(message: bytes | None = None, stream: int = 1) -> bytes:
    """The frames of a valid call."""
    return struct.pack(">I", stream).join(http2.call_parts(infer() if message is None else message))


def frames(rng: random.Random) -> Attempt:
    """Frames of odd kinds, flags, streams and lengths."""
    sent = [http2.hello()]
    for _ in range(rng.randint(1, 8)):
        if rng.random() < 0.3:
            sent.append(valid(stream=rng.choice((1, 1, 3, 5, 0, 2, 1 << 30))))
            continue
        content = rng.randbytes(rng.choice((0, 1, 4, 5, 6, 8, 12, 100, 20_000)))
        made = http2.frame(rng.randrange(12), rng.choice((0, 1, 4, 5, 8, 32, 255)), rng.choice((0, 1, 2, 3, 1 << 30)), content)
        sent.append(made if rng.random() < 0.8 else rng.randbytes(3) + made[3:])
    return Attempt(odd.cut(rng, b"".join(sent)))


def damage(rng: random.Random) -> Attempt:
    """The bytes of a valid connection, some of them damaged."""
    return Attempt(odd.cut(rng, odd.damaged(rng, http2.hello() + valid() + valid(stream=3))))


def headers(rng: random.Random) -> Attempt:
    """Odd headers of a call: missing, repeated, very long or damaged ones."""
    lines = {b":method": b"POST", b":scheme": b"http", b":path": GRPC_PATH.encode(), b"content-type": b"application/grpc"}
    names = (
        *lines,
        b"te",
        b"grpc-timeout",
        b"grpc-encoding",
        b"grpc-accept-encoding",
        b":x",
        b"X",
        b"",
        b"connection",
        b"a\0b",
    )
    values = (
        b"",
        b"x",
        b"1n",
        b"99999999999H",
        b"-1S",
        b"gzip",
        b"identity",
        b"trailers",
        b"GET",
        b"\xff",
        b"a\r\nb",
        b"y" * 100,
    )
    block = b"".join(http2.literal(*line) for line in lines.items() if rng.random() < 0.9)
    block += b"".join(http2.literal(rng.choice(names), rng.choice(values)) for _ in range(rng.choice((1, 3, 10, 200))))
    if rng.random() < 0.3:
        block = odd.damaged(rng, block)
    pieces = [block[i : i + 9_000] for i in range(0, len(block), 9_000)] or [b""]
    sent = http2.frame(http2.HEADERS, 4 if len(pieces) == 1 else 0, 1, pieces[0])
    sent += b"".join(http2.frame(9, 4 if piece is pieces[-1] else 0, 1, piece) for piece in pieces[1:])
    body = http2.frame(http2.DATA, 1, 1, struct.pack(">?I", rng.random() < 0.2, rng.choice((4, 0, 9, 1 << 31))) + b"abcd")
    return Attempt(odd.cut(rng, http2.hello() + sent + body))


def floods(rng: random.Random) -> Attempt:
    """Many frames that cost the server more than the client, such as streams that are reset at once."""
    count = rng.choice((10, 200, 1_000))
    code = struct.pack(">I", 8)
    match rng.randrange(5):
        case 0:
            made = b"".join(valid(stream=i) + http2.frame(http2.RST_STREAM, 0, i, code) for i in range(1, 2 * count, 2))
        case 1:
            made = http2.frame(http2.PING, 0, 0, bytes(8)) * count
        case 2:
            made = http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 3, 7) * 20) * count
        case 3:
            made = http2.frame(http2.HEADERS, 0, 1, http2.call_headers()) + http2.frame(9, 0, 1, b"") * count
        case _:
            made = valid()[:-4] + b"".join(http2.frame(http2.DATA, 0, 1, b"") for _ in range(count))
    return Attempt([http2.hello() + made], leaves=rng.choice((None, "closes", "resets")))


def prefaces(rng: random.Random) -> Attempt:
    """What is no HTTP/2 at all, or only its beginning."""
    hello = http2.hello()
    sent = rng.choice(
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", rng.randbytes(100), hello[: rng.randrange(len(hello))], b"\0", hello * 2)
    )
    return Attempt(odd.cut(rng, sent))


def truncated(rng: random.Random) -> Attempt:
    """A valid call that ends in the middle, or whose client does not wait for the answer."""
    sent = http2.hello() + valid() + valid(stream=3)
    steps: list[bytes | float] = [*odd.cut(rng, sent[: rng.randrange(30, len(sent) + 1)])]
    return Attempt([*steps, rng.choice((0.0, 0.002))], leaves=rng.choice(("closes", "resets")))


_CALLS = (tensors, parameters, messages, streams)
_BYTES = (frames, damage, headers, floods, prefaces, truncated)
KINDS: dict[str, Callable[[random.Random], Attempt | Call]] = {f"grpc-{kind.__name__}": kind for kind in (*_CALLS, *_BYTES)}
SHARES = {"grpc-floods": 0.1}
"""The number of attempts of a kind, as a share of the others'."""
