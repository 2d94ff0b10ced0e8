"""Bodies of HTTP messages: inflates requests up to a limit, and compresses answers."""

import zlib

from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.messages import Answer, Request

MOST_SMALL = 4096
"""The longest body of a request that is no inference."""
WORTH_IT = 16 << 10
"""Answers of fewer bytes are not compressed."""

_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # zlib's window bits: 31 for gzip's format, 15 for zlib's
_PIECE = 16 << 10  # compressed bytes that are inflated at once
_MOST_MEMBERS = 1000  # of a body in gzip's format; usual ones have one, and each takes time
_LEVEL = 1  # zlib's fastest level
_ACCEPT = (b"accept-encoding", b"gzip, deflate")
_VARY = (b"vary", b"accept-encoding")
_BINARY = b"application/octet-stream"


def small(data: bytes) -> bytes:
    """The body of a request that is no inference. Raises RequestError (413) if it is long."""
    if len(data) > MOST_SMALL:
        raise too_long(MOST_SMALL)
    return data


def read(request: Request, most: int) -> bytes:
    """The body of a request, inflated.

    Args:
      request: the request.
      most: the limit in bytes, for the body as it is sent and for the inflated one.

    Raises:
      RequestError: the body is too long (413), has another coding than gzip and deflate (415), or is damaged (400).
    """
    if len(request.body) > most:
        raise too_long(most)
    coding = request.headers.get(b"content-encoding")
    return request.body if coding is None else inflate(request.body, coding, most)


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
            headers=[_ACCEPT],
        )
    name, whole, at, inflater = coding.decode(), memoryview(body), 0, zlib.decompressobj(_WINDOWS[coding])
    parts, left, members = list[bytes](), most + 1, 1
    while at < len(whole):
        if inflater.eof:
            if _WINDOWS[coding] != _WINDOWS[b"gzip"]:  # only gzip's format allows several members
                raise RequestError(f"the body in the format of {name} has data after its end; compress it as one whole")
            if members == _MOST_MEMBERS:
                raise RequestError(f"the body has more than {members:,} members of gzip; compress it as one whole")
            inflater, members = zlib.decompressobj(_WINDOWS[coding]), members + 1
        # A piece, not all that is left: at the end of a member, zlib copies what it was given and has not used.
        piece = whole[at : at + _PIECE]
        try:
            parts.append(inflater.decompress(piece, left))
        except zlib.error as e:
            raise RequestError(f"the body is not in the format of {name}: {e}; compress it again") from e
        at += len(piece) - len(inflater.unused_data)
        left -= len(parts[-1])
        if left <= 0:
            raise too_long(most)
    if not inflater.eof:
        raise RequestError(f"the body in the format of {name} ends too early; send all of it")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def compressed(answer: Answer, accepted: bytes) -> Answer:
    """The answer, compressed if the client accepts that and it is worth it. Tensors hardly shrink, so they stay as they are.

    Args:
      answer: the answer.
      accepted: the header Accept-Encoding of the request.

    >>> [compressed(Answer(bytes(20_000)), accepted).headers[1:] for accepted in (b"br, gzip", b"gzip;q=0, *")]
    [((b'content-encoding', b'gzip'), (b'vary', b'accept-encoding')), ((b'vary', b'accept-encoding'),)]
    """
    if len(answer.body) < WORTH_IT or answer.headers[0][1] == _BINARY:
        return answer
    weights = dict(_weighted(choice) for choice in accepted.lower().split(b","))
    for coding in (b"gzip", b"deflate"):
        if weights.get(coding, False):
            deflater = zlib.compressobj(_LEVEL, wbits=_WINDOWS[coding])
            body = deflater.compress(answer.body) + deflater.flush()
            return answer._replace(body=body, headers=(*answer.headers, (b"content-encoding", coding), _VARY))
    return answer._replace(headers=(*answer.headers, _VARY))


def _weighted(choice: bytes) -> tuple[bytes, bool]:
    """A coding of Accept-Encoding, and whether the client accepts it: `gzip;q=0` refuses gzip."""
    coding, _, weight = choice.partition(b";")
    return coding.strip(), b"".join(weight.split()).rstrip(b"0") not in (b"q=", b"q=0.", b"q=.")


def too_long(most: int) -> RequestError:
    """The error for a body of more than `most` bytes.

    >>> too_long(1024).status
    413
    """
    remedy = "send fewer inputs in a request" if most > MOST_SMALL else "send a shorter one"
    return RequestError(f"the body has more than {most:,} bytes; {remedy}", status=413)
