"""The access log: a line of JSON for each answer over HTTP, and for each call of gRPC."""

import collections
import logging
import os
import re
import threading
import time
from typing import Any

import msgspec

from superserve_jax import errors
from superserve_jax.gateway.messages import Answer, Request

_log = logging.getLogger(__name__)

_MOST_LINES = 100_000  # that wait to be written
_AT_ONCE = 1_000  # lines that are written together
_EVERY_S, _LAST_S = 1.0, 1.0  # the time between two writes, and how long the last one may take
_TRACE = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class AccessLog:
    """Writes a line of JSON for each answer. A thread of its own writes the lines, about once a second.

    Args:
      file: where to append the lines; "-" is the standard output.

    A line has `time` (seconds since 1970), `client`, `method`, `path`, `status`, the bytes `received` and `sent`, and `ms`
    from the first byte of the request to the answer. `trace` is the id of the trace in a header traceparent. Lines of gRPC
    also have its status, as `grpc`.

    Raises ConfigError if the file cannot be written.
    """

    def __init__(self, file: str):
        self._file = _opened(file)
        self._lines, self._dropped = collections.deque[bytes](), 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="superserve-access-log", daemon=True)
        try:
            with errors.StartingThreads():
                self._thread.start()
        except errors.ThreadStartError:
            os.close(self._file)
            raise

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
            self._dropped += 1
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

    def close(self) -> None:
        """Writes the rest, and closes the file. It waits a second at most, in case the file is a pipe that nobody reads."""
        self._closed.set()
        self._thread.join(_LAST_S)
        if self._thread.is_alive():
            _log.warning("nobody reads the access log, so its last lines are lost (%d or more)", len(self._lines))

    def _write_all(self) -> None:
        """Writes lines until the log is closed."""
        told, is_closed = 0, False
        while not is_closed:
            is_closed = self._closed.wait(_EVERY_S)  # then no line is added any more
            failed = 0
            while count := min(len(self._lines), _AT_ONCE):
                failed += self._write([self._lines.popleft() for _ in range(count)])
            dropped = self._dropped
            if failed or dropped > told:
                _log.warning("%d lines of the access log are lost", failed + dropped - told)
                told = dropped
        os.close(self._file)

    def _write(self, lines: list[bytes]) -> int:
        """Writes lines. Returns how many are lost."""
        rest = memoryview(b"\n".join((*lines, b"")))
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as e:  # a full disk must not stop the gateway
            _log.warning("cannot write the access log: %s", errors.one_line(e))
            return len(lines)
        return 0


def check_file(file: str) -> None:
    """Raises ConfigError if the access log cannot be written to this file. It makes the file."""
    os.close(_opened(file))


def _opened(file: str) -> int:
    """The descriptor of the file. If a write hung in a file object, the process would wait for its lock at the end."""
    try:
        return os.dup(1) if file == "-" else os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError, TypeError) as e:
        raise errors.ConfigError(f"cannot write the access log to {file}: {errors.one_line(e)}; give another file") from e
