"""Connections of HTTP/2 for the load generator: unary calls of gRPC, with frames that are made before the run.

It needs no library. Headers of requests are literals without an index, so the state of HPACK never changes and the same bytes
serve every call. Headers of answers are not read: a call without a message, or without the end of its stream, has failed.
"""

import select
import socket
import struct
from collections.abc import Iterator

from gateway_load.messages import GRPC_PATH

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
_MAX_STREAMS, _INITIAL_WINDOW = 3, 4  # settings
_LARGEST, _DEFAULT_WINDOW = (1 << 31) - 1, 65_535
_READ = 1 << 18
_LEAST_WINDOW = 1 << 13  # bytes that a request may have


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(content))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + content


def literal(name: bytes, value: bytes) -> bytes:
    """A header of HPACK, without an index and without Huffman's code. Both texts have at most 126 bytes."""
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


def call_headers(path: str = GRPC_PATH) -> bytes:
    """The header block of a call."""
    named = {b":path": path.encode(), b":authority": b"localhost", b"content-type": b"application/grpc", b"te": b"trailers"}
    return b"\x83\x86" + b"".join(literal(name, value) for name, value in named.items())  # POST, http


def hello() -> bytes:
    """What a client sends first: it takes answers of any length without asking for more."""
    settings = struct.pack(">HI", _INITIAL_WINDOW, _LARGEST)
    window = struct.pack(">I", _LARGEST - _DEFAULT_WINDOW)
    return PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, window)


def call_parts(message: bytes) -> tuple[bytes, bytes, bytes]:
    """A call without its stream: the bytes before it, between it, and after it."""
    block, content = call_headers(), struct.pack(">?I", False, len(message)) + message
    head, body = frame(HEADERS, END_HEADERS, 0, block), frame(DATA, END_STREAM, 0, content)
    return head[:5], head[9:] + body[:5], body[9:]


class _Connection:
    """One connection: its socket, the calls by stream, and what the peer allows."""

    def __init__(self, sock: socket.socket):
        self.sock, self.next_stream = sock, 1
        self.asked: dict[int, int] = {}
        self.messages: dict[int, bytes] = {}
        self.rest, self.window, self.most, self.open = b"", _DEFAULT_WINDOW, 1 << 30, True


class Http2:
    """Connections to one port. Calls go to them in turn, any number at a time on each.

    Args:
      port: a port of this machine.
      epoll: it gets the sockets.
      connections: how many to open.
    """

    def __init__(self, port: int, epoll: select.epoll, connections: int):
        self._made: dict[int, _Connection] = {}
        self._parts: dict[bytes, tuple[bytes, bytes, bytes]] = {}
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", port), timeout=10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(hello())
            sock.setblocking(False)
            self._made[sock.fileno()] = _Connection(sock)
            epoll.register(sock.fileno(), select.EPOLLIN)
        self._turns = [*self._made.values()]

    def close(self) -> None:
        """Closes all connections."""
        for one in self._made.values():
            one.sock.close()

    @property
    def has_room(self) -> bool:
        """Whether a call can be sent now."""
        for _ in self._turns:
            one = self._turns[0]
            if one.open and len(one.asked) < one.most and one.window >= _LEAST_WINDOW:
                return True
            self._turns.append(self._turns.pop(0))
        return False

    def send(self, query: int, request: bytes) -> bool:
        """Sends the call of a message on the next connection. Returns False if the connection was broken."""
        one = self._turns[0]
        self._turns.append(self._turns.pop(0))
        parts = self._parts.get(request)
        if parts is None:
            parts = self._parts[request] = call_parts(request)
        stream = one.next_stream
        place = struct.pack(">I", stream)
        one.next_stream += 2
        one.asked[stream] = query
        one.window -= len(request) + 5
        if not self._write(one, place.join(parts)):
            one.asked.pop(stream, None)
            return False
        return True

    def receive(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Reads from a socket that has something. Yields each query that has ended, and its message.

        Of a call that has failed, it yields words and the headers. If the connection was closed, it yields b"".
        """
        one = self._made[number]
        try:
            data = one.sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            yield from self._lost(one)
            return
        data, at = one.rest + data, 0
        while len(data) - at >= 9:
            length = int.from_bytes(data[at : at + 3])
            if len(data) - at - 9 < length:
                break
            kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9])
            content = data[at + 9 : at + 9 + length]
            at += 9 + length
            if kind == DATA:
                one.messages[stream] = one.messages.get(stream, b"") + content
            elif kind not in (HEADERS, RST_STREAM):
                self._control(one, kind, flags, stream, content)
            if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                query, message = one.asked.pop(stream, None), one.messages.pop(stream, b"")
                if query is not None:
                    yield query, message if kind == HEADERS and message else b"no answer, frame %d: %b" % (kind, content)
        one.rest = data[at:]

    def _control(self, one: _Connection, kind: int, flags: int, stream: int, content: bytes) -> None:
        """A frame that belongs to the connection."""
        if kind == SETTINGS and not flags & ACK:
            values = dict(struct.iter_unpack(">HI", content))
            one.most = values.get(_MAX_STREAMS, one.most)
            self._write(one, frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._write(one, frame(PING, ACK, 0, content))
        elif kind == WINDOW_UPDATE and stream == 0:
            one.window += int.from_bytes(content)
        elif kind == GOAWAY:
            one.open = False

    def _write(self, one: _Connection, data: bytes) -> bool:
        try:
            sent = one.sock.send(data)
            if sent < len(data):
                one.sock.settimeout(10)
                one.sock.sendall(data[sent:])
                one.sock.setblocking(False)
        except OSError:
            one.open = False
            return False
        return True

    def _lost(self, one: _Connection) -> Iterator[tuple[int, bytes]]:
        one.open = False
        self._made.pop(one.sock.fileno())
        one.sock.close()
        lost = [*one.asked.values()]
        one.asked.clear()
        for query in lost:
            yield query, b""
