"""Listening sockets, the addresses that clients use, and the end of a connection that a library owns."""

import contextlib
import os
import socket
import stat
from collections.abc import Container

from superserve_jax import errors

BACKLOG = 2048
"""Connections that may wait until the event loop accepts them."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError if that fails."""
    if not host:
        raise errors.ConfigError("host is empty; give an address such as 127.0.0.1, or 0.0.0.0 for all of this machine")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, TypeError) as e:
        raise errors.ConfigError(
            f"cannot listen at host {host!r} and port {port!r}: {errors.one_line(e)}; choose another port, or 0 for a free one"
        ) from e


def url(host: str, port: int, *, secure: bool) -> str:
    """The address of a gateway for clients on this machine.

    >>> url("0.0.0.0", 8000, secure=False)
    'http://127.0.0.1:8000'
    """
    return f"{'https' if secure else 'http'}://{target(host, port)}"


def target(host: str, port: int) -> str:
    """Host and port for clients on this machine.

    >>> target("::", 8001)
    '[::1]:8001'
    """
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{f'[{shown}]' if ':' in shown else shown}:{port}"


def disconnect(port: int, peers: Container[tuple[str, int]]) -> None:
    """Ends connections to a port of this process, although a library owns their sockets and has no function for this.

    Args:
      port: the port.
      peers: host and port of the clients.
    """
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it has just been closed, or is not connected
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as sock:  # the library may close its descriptor at any time
                    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] == port:
                        host, number, *_ = sock.getpeername()
                        if (host.removeprefix("::ffff:"), number) in peers:
                            sock.shutdown(socket.SHUT_RDWR)
