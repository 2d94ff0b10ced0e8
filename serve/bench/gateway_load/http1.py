"""Connections of HTTP/1.1 for the load generator: one request at a time on each, and none is opened during a run."""

import re
import select
import socket
from collections.abc import Iterator

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_READ = 1 << 16
LAST_CHUNK = b"\r\n0\r\n\r\n"
"""The end of an answer without a length."""


class Http1:
    """A pool of connections to one port. The connection that was used last is used next, so few are in use.

    Args:
      port: a port of this machine.
      epoll: it gets the sockets.
      connections: how many to open.
    """

    def __init__(self, port: int, epoll: select.epoll, connections: int):
        self._port, self._epoll = port, epoll
        self._sockets: dict[int, socket.socket] = {}
        self._idle: list[int] = []
        self._asked: dict[int, int] = {}  # the query that each busy connection waits for
        self._parts: dict[int, bytes] = {}  # answers of which only a part has come
        for _ in range(connections):
            self._open()

    def _open(self) -> None:
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._sockets[sock.fileno()] = sock
        self._idle.append(sock.fileno())
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Closes all connections."""
        for sock in self._sockets.values():
            sock.close()

    @property
    def has_room(self) -> bool:
        """Whether a request can be sent now."""
        return bool(self._idle)

    def send(self, query: int, request: bytes) -> bool:
        """Sends a request on an idle connection. Returns False if the connection was broken."""
        number = self._idle.pop()
        try:
            sent = self._sockets[number].send(request)
            if sent < len(request):  # a request of more than the socket's buffer, hundreds of KB
                self._sockets[number].settimeout(10)
                self._sockets[number].sendall(request[sent:])
                self._sockets[number].setblocking(False)
        except OSError:
            self._drop(number)
            return False
        self._asked[number] = query
        return True

    def receive(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Reads from a socket that has something. Yields the query and its answer; b"" if the connection was closed."""
        try:
            data = self._sockets[number].recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            query = self._asked.pop(number, None)
            self._drop(number)
            if query is not None:
                yield query, b""
            return
        if number in self._parts:
            data = self._parts.pop(number) + data
        end = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, end + 4) if end >= 0 else None
        if not (data.endswith(LAST_CHUNK) if length is None else len(data) >= end + 4 + int(length[1])):
            self._parts[number] = data
            return
        query = self._asked.pop(number, None)
        self._idle.append(number)
        if query is not None:
            yield query, data

    def _drop(self, number: int) -> None:
        """Closes a connection, and opens another one if the server takes it."""
        self._epoll.unregister(number)
        self._sockets.pop(number).close()
        self._parts.pop(number, None)
        if number in self._idle:
            self._idle.remove(number)
        try:
            self._open()
        except OSError:
            return
