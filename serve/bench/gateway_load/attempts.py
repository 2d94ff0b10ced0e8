"""Makes attempts (see `malformed`) on the port of HTTP, and judges what comes back."""

import asyncio
import contextlib
import json
import socket
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from gateway_load.malformed import Attempt

ALLOWED = {200, 400, 401, 403, 404, 405, 408, 411, 413, 414, 415, 417, 426, 429, 431, 501, 503, 504, 505}
"""The statuses that a malformed request may get. 500 is a bug of the gateway."""
_PATIENCE_S = 0.05  # how long to wait for an answer to what may be only a part of a request
_READ = 1 << 16
_LINGER = struct.pack("ii", 1, 0)


class Response(NamedTuple):
    """An answer of HTTP. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def plain(self) -> bytes:
        """The body without its compression."""
        coding = self.headers.get("content-encoding")
        return zlib.decompress(self.body, 47) if coding else self.body  # 47: the header of gzip or zlib


class BrokenRuleError(Exception):
    """The gateway has broken a rule. The message says which one, and what came."""


class Responses:
    """Takes the bytes of a connection apart.

    Args:
      is_head: whether answers to HEAD have no body, whatever their length.
    """

    def __init__(self, *, is_head: bool):
        self.found: list[Response] = []
        self.rest = b""
        self._is_head, self._is_stream = is_head, False

    def feed(self, data: bytes) -> None:
        """Adds bytes. Raises BrokenRuleError if they are no HTTP."""
        if self._is_stream:  # it lasts until the connection ends
            return
        self.rest += data
        while b"\r\n\r\n" in self.rest:
            head, _, body = self.rest.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            words = first.split(" ", 2)
            if len(words) < 2 or words[0] != "HTTP/1.1" or not words[1].isdigit():
                raise BrokenRuleError(f"an answer begins with {first[:200]!r}")
            named = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            status = int(words[1])
            self._is_stream = named.get("content-type") == "text/event-stream" and named.get("connection") == "close"
            if self._is_stream:
                body = b""
            length = 0 if status < 200 or self._is_head or self._is_stream else int(named.get("content-length", -1))
            if length < 0:
                raise BrokenRuleError(f"an answer has no length: {head[:300]!r}")
            if len(body) < length:
                return
            self.rest = body[length:]
            if status >= 200:
                self.found.append(Response(status, named, body[:length]))


async def attempt(port: int, tried: Attempt, limit_s: float) -> list[Response]:
    """Makes one attempt.

    Args:
      port: the port of HTTP.
      tried: what to do.
      limit_s: the longest time until an answer comes, or until the connection is closed after the client's end of it.

    Returns the answers. Raises BrokenRuleError if the gateway has broken a rule.
    """
    responses = Responses(is_head=tried.is_head)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        cut_off = await send(writer, tried.steps)
        if tried.leaves == "closes":
            writer.close()
            return []
        if tried.leaves == "resets":
            return []
        wanted = max(tried.answers or 0, len(tried.numbers))
        ended = await _read(reader, responses, wanted or 1, limit_s if wanted else _PATIENCE_S)
        if ended is None and wanted:
            raise BrokenRuleError(f"{len(responses.found)} of {wanted} answers came in {limit_s:g} s")
        if not ended:
            if not cut_off:
                with contextlib.suppress(OSError):
                    writer.write_eof()
            if not await _read(reader, responses, 1 << 30, limit_s):
                raise BrokenRuleError(f"the connection was still open {limit_s:g} s after the client's end of it was closed")
        judge(tried, responses)
        return responses.found
    finally:
        abort(writer)


def abort(writer: asyncio.StreamWriter) -> None:
    """Closes a connection by a reset, which leaves no socket behind that waits for a minute."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    writer.transport.abort()


async def send(writer: asyncio.StreamWriter, steps: Sequence[bytes | float]) -> bool:
    """Sends the steps. Returns whether the gateway has closed the connection before the last one."""
    try:
        for step in steps:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            await asyncio.sleep(0 if isinstance(step, bytes) else step)
    except ConnectionError:
        return True
    return False


async def _read(reader: asyncio.StreamReader, responses: Responses, wanted: int, limit_s: float) -> bool | None:
    """Reads until `wanted` answers have come: False. True if the connection was closed before, None if the time is over."""
    try:
        async with asyncio.timeout(limit_s):
            while len(responses.found) < wanted:
                data = await reader.read(_READ)
                if not data:
                    return True
                responses.feed(data)
    except ConnectionError:
        return True
    except TimeoutError:
        return None
    return False


def judge(tried: Attempt, responses: Responses) -> None:
    """Raises BrokenRuleError unless the answers fit the attempt and follow the rules."""
    found = responses.found
    if responses.rest and not tried.is_head:  # a request that is malformed as well as a HEAD gets a body
        raise BrokenRuleError(f"an answer is incomplete: {responses.rest[:300]!r}")
    if tried.answers is not None and len(found) != tried.answers:
        raise BrokenRuleError(f"{len(found)} answers came, expected {tried.answers}: {[r.status for r in found]}")
    for response in found:
        if response.status not in ALLOWED:
            raise BrokenRuleError(f"status {response.status}: {response.body[:300]!r}")
        if response.status >= 400 and not tried.is_head:
            check_error(response)
    for place, number in enumerate(tried.numbers):
        response = found[place] if place < len(found) else None
        if response is None or response.status != 200:
            what = "none" if response is None else f"{response.status}, {response.body[:200]!r}"
            raise BrokenRuleError(f"request {place} of {len(tried.numbers)} is valid, and got this answer: {what}")
        first = json.loads(response.body)["outputs"][0]["data"][0]
        if first != number:
            raise BrokenRuleError(f"request {place} sent {number}, and got the answer of another one: {first}")


def check_error(response: Response) -> None:
    """Raises BrokenRuleError unless an error is JSON with one printable line of text in `error`."""
    try:
        text = json.loads(response.plain)["error"]
        is_right = isinstance(text, str) and text.isprintable() and 10 <= len(text) <= 2_000
    except (ValueError, TypeError, KeyError, zlib.error):
        is_right = False
    if not is_right or response.headers.get("content-type") != "application/json":
        raise BrokenRuleError(f"the error of status {response.status} is not JSON with one line: {response.body[:600]!r}")
