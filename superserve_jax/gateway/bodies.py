"""Bodies of HTTP messages: reads them up to a limit, inflates and compresses them."""

import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from superserve_jax.gateway.tensors import RequestError

_WINDOWS = {b"gzip": 31, b"deflate": 15}  # zlib's window bits: 15 with the header of zlib, 31 with the one of gzip
_LEAST_BYTES = 1400  # a shorter answer fits into one packet, so there is nothing to gain
_LEVEL = 1  # zlib's fastest level


class DisconnectedError(Exception):
    """The client has closed the connection before its request was complete."""


async def read(receive: Callable[[], Awaitable[Any]], headers: Mapping[bytes, bytes], most: int) -> bytes:
    """The body of a request, inflated.

    Args:
      receive: ASGI's function.
      headers: the headers of the request, with names in lower case.
      most: the limit in bytes, for the body as it is sent and for the inflated one.

    Raises:
      RequestError: the body is too long (413), has another coding than gzip and deflate (415), or is damaged (400).
      DisconnectedError: the client has gone.
    """
    length = headers.get(b"content-length")
    if length is not None and int(length) > most:  # the parser of HTTP takes digits only
        raise _too_long(most)
    message = await receive()
    body = message.get("body")
    if body is None:
        raise DisconnectedError
    if len(body) > most:
        raise _too_long(most)
    if message["more_body"]:
        parts, size = [body], len(body)
        while message["more_body"]:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            parts.append(message["body"])
            size += len(parts[-1])
            if size > most:
                raise _too_long(most)
        body = b"".join(parts)
    coding = headers.get(b"content-encoding")
    return body if coding is None else inflate(body, coding, most)


def inflate(body: bytes, coding: bytes, most: int) -> bytes:
    """Undoes the Content-Encoding of a body. It stops at `most` bytes, so a small body cannot become a huge one.

    Raises RequestError as `read`.

    >>> inflate(zlib.compress(b"abc"), b"deflate", 10)
    b'abc'
    """
    coding = coding.strip().lower()
    if coding in (b"identity", b""):
        return body
    if coding not in _WINDOWS:
        raise RequestError(
            f"Content-Encoding is {coding[:50].decode('latin-1')!r}, expected gzip or deflate; send the body as it is",
            status=415,
        )
    inflater = zlib.decompressobj(_WINDOWS[coding])
    try:
        inflated = inflater.decompress(body, most + 1)
    except zlib.error as e:
        raise RequestError(f"the body is not in the format of {coding.decode()}: {e}; compress it again") from e
    if len(inflated) > most:
        raise _too_long(most)
    if not inflater.eof or inflater.unused_data:
        what = "goes on behind its end" if inflater.eof else "ends too early"
        raise RequestError(f"the body in the format of {coding.decode()} {what}; compress it as one whole")
    return inflated


def compressed(body: bytes, accepted: bytes | None) -> tuple[bytes, bytes | None]:
    """The body of an answer, compressed if the client accepts that and it is worth it, and its Content-Encoding.

    Args:
      body: the body.
      accepted: the header Accept-Encoding of the request.

    >>> compressed(bytes(10_000), b"br, gzip")[1], compressed(bytes(10_000), b"gzip;q=0, *")[1], compressed(b"a", b"gzip")[1]
    (b'gzip', None, None)
    """
    if accepted is None or len(body) < _LEAST_BYTES:
        return body, None
    weights = dict(_weighted(choice) for choice in accepted.lower().split(b","))
    for coding, window in _WINDOWS.items():
        if weights.get(coding, False):
            deflater = zlib.compressobj(_LEVEL, wbits=window)
            return deflater.compress(body) + deflater.flush(), coding
    return body, None


def _weighted(choice: bytes) -> tuple[bytes, bool]:
    """A coding of Accept-Encoding, and whether the client accepts it: `gzip;q=0` refuses gzip."""
    coding, _, weight = choice.partition(b";")
    return coding.strip(), weight.replace(b" ", b"").rstrip(b"0") not in (b"q=", b"q=0.", b"q=.")


def _too_long(most: int) -> RequestError:
    return RequestError(f"the body has more than {most:,} bytes; send fewer inputs in a request", status=413)
