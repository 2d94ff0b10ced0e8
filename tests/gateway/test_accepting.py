"""Connections that open: how many there may be, and errors of the system."""

import asyncio
import contextlib
import errno
import http.client
import os
import socket
import ssl
import time
import urllib.request

import fakes
from gateways import TLS, answers, connect, is_closed, opened

from superserve_jax.gateway.accepting import Accepting


def test_silent_tls_handshakes_are_limited_and_end_after_head_s():
    most, head_s = 3, 1.0
    with contextlib.ExitStack() as stack:
        limits = {"max_connections": most, "head_s": head_s}
        _, door = stack.enter_context(opened(gateway_options=TLS, limits=limits))
        start_s = time.monotonic()
        silent = [stack.enter_context(connect(door)) for _ in range(most)]
        further = stack.enter_context(connect(door))
        assert is_closed(further)
        assert time.monotonic() - start_s < head_s
        assert all(map(is_closed, silent))
        assert time.monotonic() - start_s >= 0.9 * head_s
        fakes.wait_until(lambda: gets_in(door))  # there is room again


def gets_in(door) -> bool:
    """Whether a client with TLS gets an answer."""
    context = ssl.create_default_context(cafile=TLS["tls_cert"])
    try:
        with urllib.request.urlopen(f"{door.url}/v2/health/live", timeout=fakes.WAIT_S, context=context) as got:
            return got.status == 200
    except (OSError, http.client.HTTPException):  # the gateway has closed the connection
        return False


def test_without_tls_a_connection_too_many_gets_an_answer():
    with opened(limits={"max_connections": 2}) as (_, door), connect(door) as one, connect(door) as two, connect(door) as more:
        assert answers(more)[0].status == 503
        for sock in (one, two):
            sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answers(sock)[0].status == 200


class Failing(socket.socket):
    """A socket that cannot accept a connection, for the first `faults` times."""

    faults, number = 1, errno.EMFILE

    def accept(self):
        if self.faults:
            self.faults -= 1
            raise OSError(self.number, os.strerror(self.number))
        return super().accept()


class Seen(asyncio.Protocol):
    """Collects the transports of all connections."""

    made: list[asyncio.Transport]

    def connection_made(self, transport):
        self.made.append(transport)


def accept(listener: socket.socket, *, clients: int, most: int) -> int:
    """Lets clients connect, and then accepts. Returns how many connections opened."""
    Seen.made = []

    async def run():
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with contextlib.ExitStack() as stack:
            for _ in range(clients):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            accepting = Accepting(listener, Seen, most=most, handshake_s=1.0, shutdown_s=1.0, tls=None)
            end_s = time.monotonic() + fakes.WAIT_S
            while len(Seen.made) < clients and time.monotonic() < end_s:
                await asyncio.sleep(0.01)
            accepting.stop()
            for transport in Seen.made:
                transport.close()

    asyncio.run(run())
    return len(Seen.made)


def test_without_tls_connections_that_come_together_all_open():
    assert accept(socket.socket(), clients=5, most=1) == 5


def test_an_error_of_the_system_is_logged_and_accepting_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("superserve_jax.gateway.accepting._RETRY_S", 0.05)
    assert accept(Failing(), clients=1, most=4) == 1
    assert os.strerror(errno.EMFILE).lower() in caplog.text.lower()


def test_clients_behind_one_that_has_gone_are_accepted_when_the_port_closes():
    Seen.made = []
    listener = Failing()
    listener.number = errno.ECONNABORTED

    async def run():
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepting = Accepting(listener, Seen, most=1, handshake_s=1.0, shutdown_s=1.0, tls=None)
            accepting.stop()
            await asyncio.gather(*accepting.opening)
            for transport in Seen.made:
                transport.close()

    asyncio.run(run())
    assert len(Seen.made) == 1
