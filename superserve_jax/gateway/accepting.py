"""Accepts the connections of a port, and limits how many TLS handshakes there may be at once.

`create_server` of an event loop reports a connection only after its handshake. With it, a client could begin any number of
handshakes.
"""

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Callable

from superserve_jax import errors

_log = logging.getLogger(__name__)

_AT_ONCE = 256  # connections that are accepted before the loop does something else
_RETRY_S = 1.0  # the pause after an error, such as too many open files


class Accepting:
    """Accepts connections until `stop`. Make it in the thread of the event loop.

    Args:
      listener: a socket that listens.
      connect: makes the protocol of a connection.
      most: how many TLS handshakes there may be at once. Further connections are closed.
      handshake_s: how many seconds a TLS handshake may take.
      shutdown_s: how many seconds the end of TLS may take.
      tls: None without TLS. Then each connection opens at once, so `most` has no effect.

    Attributes:
      opening: the connections that are not open yet.
    """

    def __init__(
        self,
        listener: socket.socket,
        connect: Callable[[], asyncio.Protocol],
        *,
        most: int,
        handshake_s: float,
        shutdown_s: float,
        tls: ssl.SSLContext | None,
    ):
        self._listener, self._connect, self._loop = listener, connect, asyncio.get_running_loop()
        self._most = math.inf if tls is None else most
        self._tls = (
            {} if tls is None else {"ssl_handshake_timeout": handshake_s, "ssl_shutdown_timeout": shutdown_s, "ssl": tls}
        )
        self.opening = set[asyncio.Task[None]]()
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._resume()

    def stop(self) -> None:
        """Accepts the connections that wait in the system's queue, and closes the port. Closing alone would reset them."""
        self._loop.remove_reader(self._listener)
        while self._accept_some():
            pass
        if self._retry is not None:
            self._retry.cancel()
        self._listener.close()

    def _resume(self) -> None:
        self._loop.add_reader(self._listener, self._accept_some)

    def _accept_some(self) -> bool:
        """Accepts the connections that wait. Returns whether there may be more."""
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:  # this client has gone; others may wait behind it
                continue
            except OSError as e:
                _log.error("no connection can be accepted now, which is tried again: %s", errors.one_line(e))
                self._loop.remove_reader(self._listener)
                self._retry = self._loop.call_later(_RETRY_S, self._resume)
                return False
            if len(self.opening) >= self._most:
                sock.close()
                continue
            task = self._loop.create_task(self._open(sock))
            self.opening.add(task)
            task.add_done_callback(self.opening.discard)
        return True

    async def _open(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has gone, or its handshake is wrong or took too long
            await self._loop.connect_accepted_socket(self._connect, sock, **self._tls)
