"""Requests and answers of HTTP, between the connections and the application. No sockets."""

import http
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import httptools
import msgspec

from superserve_jax.gateway import failures
from superserve_jax.gateway.failures import RequestError

if TYPE_CHECKING:
    from superserve_jax.gateway.spans import Span

Headers = Sequence[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
"""The header of an answer in JSON."""

_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_JSON_ONLY = (JSON,)
_JSON_START = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"

# Several lines of one of these headers are joined.
_LISTS = (b"accept", b"accept-encoding", b"connection", b"tracestate", b"transfer-encoding")
# With two of these, a proxy might read the one and the gateway the other.
_SINGLE = frozenset(
    (b"authorization", b"content-encoding", b"content-length", b"expect", b"host", b"inference-header-content-length")
) | {b"x-slo-ms", b"x-slo-ttft-ms"}


class Request:
    """A request, as it arrives.

    Args:
      began_s: when its first byte came, in seconds of the event loop's clock.

    Attributes:
      method, target: such as "POST" and b"/v2/models/digits/infer?a=1".
      headers: the headers, with names in lower case. Trailers are not among them.
      body: the body, as it was sent; it is complete when the application gets the request.
      head_bytes, received: bytes of its head and of its body so far.
      held: its bytes in memory.
      keep_alive: whether the connection stays open after the answer.
      error: why it is refused without the application.
      left: whether its client has gone away before the answer.
      span: the span of an inference; None unless the gateway makes spans.
    """

    __slots__ = (
        *("began_s", "body", "error", "head_bytes", "headers", "held"),
        *("keep_alive", "left", "method", "parts", "received", "span", "target"),
    )

    def __init__(self, began_s: float = 0.0):
        self.began_s, self.head_bytes, self.received, self.held, self.keep_alive = began_s, 0, 0, 0, True
        self.method, self.target, self.body = "", b"", b""
        self.headers: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []
        self.error: BaseException | None = None
        self.left = False
        self.span: Span | None = None

    def add_header(self, name: bytes, value: bytes) -> None:
        """Adds a line of the head. Raises RequestError if one that counts is repeated."""
        name = name.lower()
        self.head_bytes += len(name) + len(value)
        if name not in self.headers:
            self.headers[name] = value
        elif name in _LISTS:
            self.headers[name] += b", " + value
        elif name in _SINGLE:
            raise RequestError(f"the header {name.decode()} is repeated; send it once")

    @property
    def path(self) -> str:
        """The path, without its query and with %-escapes decoded. Raises RequestError if the target is no path.

        >>> request = Request()
        >>> request.target = b"/v2/models/a%20b?c"
        >>> request.path
        '/v2/models/a b'
        """
        try:
            target = self.target if self.target.startswith(b"/") else httptools.parse_url(self.target).path
            path = target.partition(b"?")[0].decode("ascii")
        except (AttributeError, UnicodeDecodeError, httptools.HttpParserError) as e:
            raise RequestError(f"the target {self.target[:100]!r} is no path; send one such as /v2") from e
        return urllib.parse.unquote(path) if "%" in path else path


class Answer(NamedTuple):
    """An answer.

    Args:
      body: the body.
      status: the status.
      headers: the headers, without those that the connection adds: content-length and connection.
      stream: sends the body in parts instead. It is closed when the client goes away, or when the gateway closes. It is the
        last answer of its connection.
    """

    body: bytes = b""
    status: int = 200
    headers: Headers = _JSON_ONLY
    stream: AsyncIterator[bytes] | None = None


def encoded(answer: Answer, request: Request) -> bytes:
    """The bytes of an answer: its head, and its body unless that is a stream.

    >>> encoded(Answer(b"{}"), Request())
    b'HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: 2\\r\\n\\r\\n{}'
    """
    body, status, headers, stream = answer
    if headers is _JSON_ONLY and status == 200 and request.keep_alive and request.method != "HEAD":
        return _JSON_START % (len(body), body)  # the usual answer, made in one step; the bytes are those of below
    lines = [_LINES[status], *(b"%b: %b\r\n" % header for header in headers)]
    if stream is None:
        lines.append(b"content-length: %d\r\n" % len(body))
    if not request.keep_alive:
        lines.append(b"connection: close\r\n")
    lines += (b"\r\n", b"" if request.method == "HEAD" else body)
    return b"".join(lines)


def failed(error: BaseException) -> Answer:
    """The answer for an error: JSON with `error`, which says what to do.

    >>> failed(RequestError("the input is too short; send 4 numbers")).body
    b'{"error":"the input is too short; send 4 numbers"}'
    """
    status = failures.status_of(error)
    headers = [JSON, *(error.headers if isinstance(error, RequestError) else ())]
    if status in failures.RETRY:
        headers.append(failures.RETRY_AFTER)
    return Answer(msgspec.json.encode({"error": failures.message_of(error)}), status, headers)
