"""The access log: a line of JSON for each answer over HTTP, and for each call of gRPC."""

import contextlib
import logging
import re
import sys
import time
from typing import IO, Any

import msgspec

from superserve_jax import errors
from superserve_jax.gateway.messages import Answer, Request

_log = logging.getLogger(__name__)

_MOST_LINES = 100_000  # that wait to be written
_TRACE = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class AccessLog:
    """Writes a line of JSON for each answer. Lines are written about once a second.

    Args:
      file: where to append the lines; "-" is the standard output.

    A line has `time` (seconds since 1970), `client`, `method`, `path`, `status`, the bytes `received` and `sent`, and `ms`
    from the first byte of the request to the answer. `trace` is the id of the trace in a header traceparent. Lines of gRPC
    also have its status, as `grpc`.
    """

    def __init__(self, file: str):
        try:
            self._file: IO[str] = sys.stdout if file == "-" else open(file, "a", encoding="utf-8")  # noqa: SIM115 - see `close`
        except OSError as e:
            raise errors.ConfigError(f"cannot write the access log to {file}: {errors.one_line(e)}; give another file") from e
        self._lines, self._lost = list[bytes](), 0

    def add(self, client: str, request: Request, answer: Answer, *, sent: int, seconds: float) -> None:
        """Adds a line for an answer over HTTP. The query of the path is left out, since it may hold secrets."""
        self.add_line(
            client=client,
            method=request.method,
            path=request.target.partition(b"?")[0][:500].decode("latin-1"),
            status=answer.status,
            received=request.received,
            sent=sent,
            seconds=seconds,
            trace=request.headers.get(b"traceparent", b""),
        )

    def add_line(
        self,
        *,
        client: str,
        method: str,
        path: str,
        status: int,
        received: int,
        sent: int,
        seconds: float,
        trace: bytes,
        grpc: str | None = None,
    ) -> None:
        """Adds a line. `grpc` is the name of gRPC's status, such as "NOT_FOUND"; None leaves it out."""
        if len(self._lines) >= _MOST_LINES:
            self._lost += 1
            return
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "client": client,
            "method": method,
            "path": path,
            "status": status,
            "received": received,
            "sent": sent,
            "ms": round(1e3 * seconds, 3),
        }
        if grpc is not None:
            line["grpc"] = grpc
        if found := _TRACE.fullmatch(trace):
            line["trace"] = found[1].decode()
        self._lines.append(msgspec.json.encode(line))

    def flush(self) -> None:
        """Writes the lines. It may be slow, so another thread should call it."""
        lines, self._lines = self._lines, []
        lost, self._lost = self._lost, 0
        if lines:
            try:
                self._file.write(b"\n".join((*lines, b"")).decode())
                self._file.flush()
            except (OSError, ValueError) as e:  # a full disk must not stop the gateway
                lost += len(lines)
                _log.warning("cannot write the access log: %s", errors.one_line(e))
        if lost:
            _log.warning("%d lines of the access log are lost", lost)

    def close(self) -> None:
        """Writes the rest, and closes the file."""
        self.flush()
        if self._file is not sys.stdout:
            with contextlib.suppress(OSError):  # `flush` has logged why
                self._file.close()
