"""Malformed requests of HTTP, made by number: the same seed, kind and number give the same bytes.

One file because all kinds are in one table. `KINDS` has a function for each kind.
"""

import dataclasses
import gzip
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

from gateway_load import odd
from gateway_load.messages import PATH


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


def headers(rng: random.Random) -> Attempt:
    """Odd headers, also repeated ones, very long ones, and very many."""
    body, length = odd.binary(rng) if rng.random() < 0.5 else (odd.dumped(odd.content(rng)), None)
    lines = [] if length is None else [f"Inference-Header-Content-Length: {length}"]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 20))):
        line = f"{rng.choice(odd.HEADERS)}{rng.choice((':', ': ', ' : ', ''))}{rng.choice(odd.VALUES)}"
        lines.insert(rng.randint(0, len(lines)), line)
    if rng.random() < 0.02:
        lines += ["x: " + "y" * rng.choice((10_000, 70_000, 300_000))]
    if rng.random() < 0.02:
        lines += [f"x{i}: y" for i in range(rng.choice((100, 1_000, 20_000)))]
    path = rng.choice((PATH, PATH, PATH, "/metrics", "/v2"))
    return Attempt(odd.cut(rng, odd.request(body, *lines, path=path, method="POST" if path == PATH else "GET")))


def lines(rng: random.Random) -> Attempt:
    """Odd methods, paths and versions."""
    method = rng.choice(odd.METHODS)
    body = odd.dumped(odd.content(rng)) if rng.random() < 0.5 else b""
    sent = odd.request(body, method=method, path=rng.choice(odd.PATHS), version=rng.choice(odd.VERSIONS))
    return Attempt(odd.cut(rng, sent), is_head=method == "HEAD")


def values(rng: random.Random) -> Attempt:
    """JSON with odd values, without some of its fields, or with others."""
    body = odd.dumped(odd.changed(rng, odd.content(rng)))
    if rng.random() < 0.05:
        body = rng.choice((b"[" * 100_000, b'{"inputs":' * 5_000, b"", b"null", b'"' + b"\\" * 999, b"\xef\xbb\xbf" + body))
    return Attempt(odd.cut(rng, odd.request(body)), answers=1)


def damage(rng: random.Random) -> Attempt:
    """A valid request of which some bytes are damaged, in the head or the body."""
    body, length = odd.binary(rng)
    sent = (
        odd.request(body, f"Inference-Header-Content-Length: {length}")
        if rng.random() < 0.5
        else odd.request(odd.dumped(odd.content(rng)))
    )
    return Attempt(odd.cut(rng, odd.damaged(rng, sent)))


def tensors(rng: random.Random) -> Attempt:
    """Shapes, datatypes, data and sizes that do not fit each other."""
    made = odd.content(rng)
    tensor = made["inputs"][0]
    big = (-1, 0, 1, 2, 3, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, 10**30)
    if rng.random() < 0.7:
        tensor["shape"] = [rng.choice(big) for _ in range(rng.choice((0, 1, 2, 3, 3, 3, 4, 9, 1_000)))]
    if rng.random() < 0.4:
        tensor["datatype"] = rng.choice(("BOOL", "UINT8", "INT8", "FP16", "FP32", "FP64", "BYTES", "BF16", "uint8", "", "é"))
    data = b""
    match rng.randrange(4):
        case 0:
            tensor["data"] = [rng.choice(odd.ODD) for _ in range(rng.choice((0, 1, 4, 8, 300)))]
        case 1:
            data = rng.randbytes(rng.choice((0, 1, 3, 4, 5, 8, 12, 1_000)))
            tensor["parameters"] = {"binary_data_size": rng.choice((len(data), *big, None, "4", 1.0))}
            if rng.random() < 0.7:
                del tensor["data"]
        case 2:
            made["inputs"] *= rng.choice((0, 2, 3, 500))
        case _:
            pass
    head = odd.dumped(made)
    said = rng.choice((len(head), len(head), len(head), 0, len(head) - 1, len(head) + len(data) + 1, 10**17))
    sent = odd.request(head + data, *([f"Inference-Header-Content-Length: {said}"] if data or rng.random() < 0.3 else []))
    return Attempt(odd.cut(rng, sent), answers=1)


def parameters(rng: random.Random) -> Attempt:
    """Odd values of the parameters of a request, of its outputs, and of the deadline in headers."""
    made = odd.content(rng)
    names = ("slo_ms", "min_accuracy", "timeout", "priority", "binary_data_output", "sequence_id", "classification", "x")
    made["parameters"] = {name: rng.choice(odd.ODD) for name in rng.sample(names, rng.randint(1, 4))}
    if rng.random() < 0.5:
        wanted = ("output", "subnet", "accuracy", "latency_ms", "queue_ms", "met_slo", "x", "")
        each = ("classification", "binary_data", "shared_memory_region", "x")
        made["outputs"] = [
            {"name": rng.choice(wanted), "parameters": {rng.choice(each): rng.choice((*odd.ODD, 1, 2, 3))}}
            for _ in range(rng.choice((1, 2, 5, 400)))
        ]
    more = [f"{name}: {rng.choice(odd.VALUES[:18])}" for name in ("X-SLO-Ms", "x-slo-ttft-ms") if rng.random() < 0.2]
    return Attempt(odd.cut(rng, odd.request(odd.dumped(made), *(line.encode().decode("latin-1") for line in more))), answers=1)


def sizes(rng: random.Random) -> Attempt:
    """Bodies that are too long, claimed or sent, and requests with very many elements."""
    match rng.randrange(6):
        case 0:
            return Attempt([odd.request(b"").replace(b"Length: 0", b"Length: %d" % rng.choice((1 << 26, 1 << 40, 10**18)))])
        case 1:
            return Attempt([odd.request(bytes(rng.choice((odd.SPLIT - 1, odd.SPLIT, odd.SPLIT + 1, 300_000))))], answers=1)
        case 2:
            head, body = odd.request(b"", "Transfer-Encoding: chunked"), b"%x\r\n%b\r\n" % (100_000, b" " * 100_000)
            return Attempt([head, *[body] * rng.choice((1, 3, 20)), b"0\r\n\r\n"], answers=1)
        case 3:
            made = odd.content(rng)
            made[rng.choice(("inputs", "outputs"))] = [{}] * rng.choice((1_000, 100_000))
            return Attempt([odd.request(odd.dumped(made))], answers=1)
        case 4:
            made = odd.content(rng)
            made["inputs"][0]["data"] = rng.choice(([[]], [0], [0.5], ["x"])) * rng.choice((1_000, 200_000))
            return Attempt([odd.request(odd.dumped(made))], answers=1)
        case _:
            rows = rng.choice((1_000, 5_000))
            x = bytes(4 * rows)
            tensor = {"name": "input", "shape": [rows, 2, 2], "datatype": "UINT8", "parameters": {"binary_data_size": len(x)}}
            head = odd.dumped({"inputs": [tensor], "parameters": {"slo_ms": 1}})
            return Attempt([odd.request(head + x, f"Inference-Header-Content-Length: {len(head)}")], answers=1)


def codings(rng: random.Random) -> Attempt:
    """Compressed bodies: bombs, damaged ones, and other codings than their header says."""
    body = odd.dumped(odd.content(rng))
    match rng.randrange(6):
        case 0:
            made = bomb(rng.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 70)))
        case 1:
            made = odd.damaged(rng, gzip.compress(body, mtime=0))
        case 2:
            made = gzip.compress(body, mtime=0)[: rng.randrange(40)]
        case 3:
            made = gzip.compress(body, mtime=0) + gzip.compress(body, mtime=0)
        case 4:
            made = gzip.compress(gzip.compress(body, mtime=0), mtime=0)
        case _:
            made = rng.choice((zlib.compress(body), zlib.compress(body)[2:-4], body, b"", rng.randbytes(100)))
    coding = rng.choice(("gzip", "gzip", "gzip", "deflate", "x-gzip", "br", "gzip, gzip", "identity", "GZIP", "", "é"))
    return Attempt(odd.cut(rng, odd.request(made, f"Content-Encoding: {coding}")), answers=1)


def bomb(megabytes: int) -> bytes:
    """A small body of gzip that becomes a large one."""
    if megabytes not in _bombs:
        _bombs[megabytes] = gzip.compress(b"[" * (megabytes << 20), 6, mtime=0)
    return _bombs[megabytes]


_bombs: dict[int, bytes] = {}


def chunks(rng: random.Random) -> Attempt:
    """Chunked bodies with wrong sizes, extensions and trailers."""
    body = odd.dumped(odd.content(rng))
    sizes = (
        f"{len(body):x}",
        "0",
        "-1",
        "+5",
        "0x5",
        "ffffffffffffffffff",
        "",
        "g",
        "5 ",
        f"{len(body):x};x=y",
        f"{len(body):x};",
    )
    sent = f"{rng.choice(sizes)}{rng.choice((chr(13) + chr(10), chr(10), chr(13)))}".encode() + body
    sent += rng.choice(
        (b"\r\n0\r\n\r\n", b"\r\n0\r\n", b"0\r\n\r\n", b"\r\n", b"\r\n0\r\nX-SLO-Ms: 1e-6\r\n\r\n", b"\r\n0\r\nx\r\n\r\n")
    )
    lines = [rng.choice(("Transfer-Encoding: chunked", "transfer-encoding:chunked", "Transfer-Encoding: chunked, chunked"))]
    if rng.random() < 0.2:
        lines.append(f"Content-Length: {rng.choice(('0', str(len(sent)), 'x'))}")
    return Attempt(odd.cut(rng, odd.request(sent, *lines)))


def truncated(rng: random.Random) -> Attempt:
    """A valid request that ends in the middle, since its client goes away."""
    sent = odd.valid(rng)[0]
    if rng.random() < 0.1:
        sent = odd.request(bytes(200_000))
    steps: list[bytes | float] = [*odd.cut(rng, sent[: rng.randrange(len(sent))])]
    if rng.random() < 0.1:
        steps.append(0.02)
    return Attempt(steps, leaves=rng.choice(("closes", "resets")))


def deserted(rng: random.Random) -> Attempt:
    """Valid requests whose client goes away before their answers, or reads none of them."""
    sent = [odd.valid(rng)[0] for _ in range(rng.choice((1, 1, 2, 20)))]
    return Attempt([b"".join(sent), rng.choice((0.0, 0.001, 0.01))], leaves=rng.choice(("closes", "resets")))


def slow(rng: random.Random) -> Attempt:
    """A valid request in many small pieces with pauses, which is answered, or whose client gives up."""
    sent, number = odd.valid(rng)
    size = rng.choice((1, 7, 40))
    pieces: list[bytes | float] = []
    for at in range(0, len(sent), size):
        pieces += [sent[at : at + size], rng.choice((0.0, 0.002))]
    if rng.random() < 0.3:
        return Attempt(pieces[: rng.randrange(len(pieces))], leaves=rng.choice(("closes", "resets")))
    return Attempt(pieces, numbers=[number], answers=1)


def pipelines(rng: random.Random) -> Attempt:
    """Valid requests and then garbage, in one packet or several. The valid ones must be answered first."""
    made = [odd.valid(rng) for _ in range(rng.choice((1, 1, 2, 3, 8)))]
    garbage = rng.choice(
        (b"\0\xff" * 20, b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"{}\r\n\r\n", rng.randbytes(50) + b"\r\n\r\n")
    )
    sent = b"".join(data for data, _ in made) + garbage
    return Attempt(odd.cut(rng, sent), numbers=[number for _, number in made])


def garbage(rng: random.Random) -> Attempt:
    """Bytes that are no HTTP at all."""
    tls = bytes.fromhex("16030100c8010000c40303") + rng.randbytes(190)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(30)
    sent = rng.choice(
        (rng.randbytes(rng.randint(1, 2_000)), tls, preface, b"\r\n" * 500, b"\n", b"\0" * 100, b"GET / HTTP/1.1")
    )
    return Attempt(odd.cut(rng, sent))


KINDS: dict[str, Callable[[random.Random], Attempt]] = {
    function.__name__: function
    for function in (
        *(headers, lines, values, damage, tensors, parameters, sizes, codings, chunks, truncated, deserted, slow),
        *(pipelines, garbage),
    )
}
SHARES = {"sizes": 0.2, "slow": 0.3, "codings": 0.5}
"""The number of attempts of a kind, as a share of the others'."""
