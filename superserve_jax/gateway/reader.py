"""Reads the requests of one connection from bytes. The parser is httptools. No sockets.

A request that is complete or refused is handed over. A refused request is the last one of its connection.
"""

from collections.abc import Callable
from typing import Any

import httptools

from superserve_jax.gateway import bodies
from superserve_jax.gateway.access import Access
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.limits import REQUEST_BYTES, Limits
from superserve_jax.gateway.messages import Request

_BODILESS = ("GET", "HEAD")
_PROBES = ("/live", "/ready")  # the ends of paths that need no token


class Buffered:
    """Counts the bytes of the requests with bodies that are in memory, over all connections of both ports.

    Args:
      limits: the limits of the gateway.
      max_body_bytes: the longest body of an inference.

    Attributes:
      nbytes: the bytes of these requests together.
    """

    def __init__(self, limits: Limits, max_body_bytes: int):
        self.limits, self.max_body_bytes = limits, max_body_bytes
        self.nbytes = 0

    def drop(self, request: Request) -> None:
        """Subtracts the bytes of a request."""
        self.nbytes -= request.held
        request.held = 0


def no_room() -> RequestError:
    """The error for a request that has no room in memory."""
    return RequestError("the gateway has too many requests in memory; try again later", status=503)


class Reader:
    """Reads requests. The parser calls the methods that are named `on_...`.

    Args:
      buffered: the requests in memory.
      access: decides who may send requests.
      clock: returns seconds.
      enter: is called with each request that is complete, or that has an `error`.
      go_on: is called when a client waits for "100 Continue" before it sends a body.

    Attributes:
      arriving: the request that is being read.
      in_body: whether the head of that request is complete.
      deaf: whether further bytes are ignored: after a refusal, after the last request, and behind a stream.
    """

    def __init__(
        self,
        buffered: Buffered,
        access: Access,
        clock: Callable[[], float],
        enter: Callable[[Request], None],
        go_on: Callable[[], None],
    ):
        self._buffered, self._access = buffered, access
        self._clock, self._enter, self._go_on = clock, enter, go_on
        self._parser: Any = httptools.HttpRequestParser(self)
        self.arriving: Request | None = None
        self.in_body = self.deaf = False
        self._most = 0  # bytes of the body of `arriving`
        self._raw_left = 0  # bytes of a body that the parser does not read
        self._fed = 0  # bytes since a head or a part of a body was complete

    def feed(self, data: bytes) -> None:
        """Reads what has come."""
        while data and not self.deaf:
            if self._raw_left:
                data = self._raw(data)
                continue
            self._fed += len(data)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:  # the client may go on in HTTP/1.1, and so does the gateway
                data = data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError as e:
                if not self.deaf:
                    self.refuse(RequestError(f"the request is malformed: {str(e)[:100].rstrip('.')}; send HTTP/1.1"))
            data = b""
        if self._fed > self._buffered.limits.max_head_bytes and not self.deaf:
            self.refuse(self._long_head())

    def refuse(self, error: BaseException) -> None:
        """Refuses the request that is being read, and everything behind it."""
        request = self.arriving or Request()
        self.arriving, self.deaf = None, True
        request.parts, request.error, request.keep_alive = [], error, False
        self._buffered.drop(request)
        self._enter(request)

    def stop(self) -> None:
        """Reads nothing more, and forgets the request that is being read."""
        if self.arriving is not None:
            self._buffered.drop(self.arriving)
        self.arriving, self.deaf = None, True

    def close(self) -> None:
        """Stops for good. Called when the connection is closed."""
        self.stop()
        self._parser = None

    # -- called by the parser ---------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self.deaf:
            self.arriving, self.in_body = Request(self._clock()), False

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        if self.arriving is not None:
            self.arriving.target += url
            self.arriving.head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the head, or a trailer. Trailers have no effect: a proxy in front does not see them."""
        request = self.arriving
        if request is not None and not self.in_body:
            try:
                request.add_header(name, value)
            except RequestError as e:
                request.error = request.error or e

    def on_headers_complete(self) -> None:
        """The head is complete. Decides whether the body is read."""
        request, parser = self.arriving, self._parser
        if request is None:
            return
        self.in_body, self._fed = True, 0
        request.method, version = parser.get_method().decode(), parser.get_http_version()
        request.keep_alive = version == "1.1" and parser.should_keep_alive()
        headers = request.headers
        length = int(headers.get(b"content-length", b"0"))
        if request.head_bytes > self._buffered.limits.max_head_bytes:
            request.error = self._long_head()
        elif version not in ("1.1", "1.0"):
            request.error = RequestError(f"the request is in HTTP/{version}; send HTTP/1.1")
        elif version == "1.1" and b"host" not in headers:
            request.error = RequestError("the request has no header Host, which HTTP/1.1 needs; send it")
        request.error = request.error or self._access.check(request) or self._check_body(request, length)
        if request.error is None and parser.should_upgrade():
            if b"transfer-encoding" in headers or request.method == "CONNECT":
                request.error = RequestError("the gateway does not upgrade connections; leave out Connection: Upgrade")
            self._raw_left = length
        if request.error is None and b"expect" in headers:
            self._expect(request, version)
        if request.error is not None:
            self.refuse(request.error)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        request = self.arriving
        if request is None:
            return
        self._fed = 0
        request.parts.append(body)
        request.received += len(body)
        request.held += len(body)
        self._buffered.nbytes += len(body)
        if (error := self._too_much(request.received, is_new=False)) is not None:
            self.refuse(error)

    def on_message_complete(self) -> None:
        """The request is complete."""
        request = self.arriving
        if request is None or self._raw_left:
            return
        self.arriving, self._fed = None, 0
        parts = request.parts
        request.body = parts[0] if len(parts) == 1 else b"".join(parts)
        request.parts = []
        self.deaf = self.deaf or not request.keep_alive
        self._enter(request)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _raw(self, data: bytes) -> bytes:
        """Reads the body of a request that asked for an upgrade. Returns what follows it."""
        body, rest = data[: self._raw_left], data[self._raw_left :]
        self._raw_left -= len(body)
        self.on_body(body)
        if not self._raw_left:
            self.on_message_complete()
        return rest

    def _expect(self, request: Request, version: str) -> None:
        """Asks a client for the body that it holds back."""
        if version == "1.0":
            del request.headers[b"expect"]  # a client of HTTP/1.0 does not know the status 100
        elif request.headers[b"expect"].lower() == b"100-continue":
            self._go_on()
        else:
            request.error = RequestError("Expect is not 100-continue; leave it out", status=417)

    def _check_body(self, request: Request, length: int) -> RequestError | None:
        """Sets the limit of a request's body. Returns an error if the body is too long or not allowed.

        A request without a body is not counted in `Buffered`. So probes are answered even if `Buffered` is full.
        """
        coding = request.headers.get(b"transfer-encoding")
        if coding is None:
            if not length:
                return None
        elif coding.lower() != b"chunked":
            return RequestError("Transfer-Encoding is not chunked; compress with Content-Encoding", status=501)
        is_inference = request.method == "POST" and request.target.endswith(b"/infer") and b"?" not in request.target
        if not is_inference:  # or its target is an unusual one
            try:
                path = request.path
            except RequestError as e:
                return e
            if request.method in _BODILESS or path.endswith(_PROBES):
                return RequestError(f"{request.method} {path[:200]} takes no body; leave it out")
            is_inference = request.method == "POST" and path.endswith("/infer")
        self._most = self._buffered.max_body_bytes if is_inference else bodies.MOST_SMALL
        request.held = REQUEST_BYTES
        self._buffered.nbytes += REQUEST_BYTES
        return self._too_much(length)

    def _too_much(self, length: int, *, is_new: bool = True) -> RequestError | None:
        """The error for a body of so many bytes, or None. `is_new`: its bytes are not in `Buffered` yet."""
        buffered = self._buffered
        if length > self._most:
            return bodies.too_long(self._most)
        if buffered.nbytes + (length if is_new else 0) > buffered.limits.max_buffered_bytes:
            return no_room()
        return None

    def _long_head(self) -> RequestError:
        most = self._buffered.limits.max_head_bytes
        return RequestError(f"the head of the request has more than {most:,} bytes; send fewer headers", status=431)
