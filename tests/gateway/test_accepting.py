"""Connections that open: how many there may be, and errors of the system."""

import asyncio
import contextlib
import errno
import pathlib
import socket
import time

import fakes
from gateways import answers, connect, is_closed, opened

from superserve_jax.gateway.accepting import Accepting

DATA = pathlib.Path(__file__).parents[1] / "data"
TLS = {"tls_cert": str(DATA / "tls_cert.pem"), "tls_key": str(DATA / "tls_key.pem")}


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
        with connect(door) as again:  # there is room again: this one is not closed at once
            again.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                assert again.recv(1)


def test_without_tls_a_connection_too_many_gets_an_answer():
    with opened(limits={"max_connections": 2}) as (_, door), connect(door) as one, connect(door) as two, connect(door) as more:
        assert answers(more)[0].status == 503
        for sock in (one, two):
            sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answers(sock)[0].status == 200


class Failing(socket.socket):
    """A socket that cannot accept a connection, as if too many files were open, for the first `faults` times."""

    faults = 1

    def accept(self):
        if self.faults:
            self.faults -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


def test_an_error_of_the_system_is_logged_and_accepting_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("superserve_jax.gateway.accepting._RETRY_S", 0.05)
    made = []

    class Seen(asyncio.Protocol):
        def connection_made(self, transport):
            made.append(transport)

    async def run():
        listener = Failing()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        accepting = Accepting(listener, Seen, most=4, handshake_s=1.0, shutdown_s=1.0, tls=None)
        with socket.create_connection(listener.getsockname()):
            end_s = time.monotonic() + fakes.WAIT_S
            while not made and time.monotonic() < end_s:
                await asyncio.sleep(0.01)
        accepting.stop()
        for transport in made:
            transport.close()

    asyncio.run(run())
    assert len(made) == 1
    assert "too many open files" in caplog.text
