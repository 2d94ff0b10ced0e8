"""The port of gRPC: a server of grpc, from opening to draining."""

import asyncio
import pathlib

import grpc

from superserve_jax import errors
from superserve_jax.gateway.access_log import AccessLog
from superserve_jax.gateway.grpc import calls, taking
from superserve_jax.gateway.grpc.calls import Calls
from superserve_jax.gateway.grpc.service import Service
from superserve_jax.gateway.grpc.standard import Health, reflection
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.reader import Buffered
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.spans import Spans
from superserve_jax.gateway.threads import LongWork

_MOST_PENDING = 1 << 14
"""Calls that may wait until the event loop takes them. grpc answers further ones with CANCELLED, by default from 1,000 on."""
_QUIET_S, _MOST_QUIET_S = 0.1, 1.0
"""A closing port refuses inferences. It closes when none has come for `_QUIET_S`, and at last after `_MOST_QUIET_S`."""
_POLL_S = 0.01
_LAST_S = 0.5
"""How long answers may take to be sent, after the last query is answered."""


class Port:
    """Serves models over gRPC, in the event loop of the thread that calls it.

    Args:
      models: the models, which may come and go.
      limits: what clients may do.
      buffered: the requests in memory, of this port and of HTTP.
      work: the threads for long work, of this port and of HTTP.
      allows: whether a call has the token, see `methods.of_service`.
      tls: the files of a certificate and of its key, in PEM; None serves without TLS.
      log: the access log.
      spans: makes the spans of inferences; None makes none.

    Attributes:
      number: the number of the open port.
    """

    def __init__(
        self,
        models: Repository,
        limits: Limits,
        buffered: Buffered,
        work: LongWork,
        allows: calls.Allows | None = None,
        tls: tuple[str, str] | None = None,
        log: AccessLog | None = None,
        spans: Spans | None = None,
    ):
        self.number, self._limits, self._tls = 0, limits, tls
        self._service = Service(models, limits, work, spans)
        methods = self._service.methods(allows) | Health(self._service, models).methods(allows)
        for version in ("v1", "v1alpha"):
            methods |= reflection(version, limits.idle_s, allows)
        options = {
            "grpc.max_receive_message_length": models.max_body_bytes,
            "grpc.max_send_message_length": -1,
            "grpc.max_concurrent_streams": sum(calls.MOST_OPEN.values()),
            "grpc.server.max_pending_requests": _MOST_PENDING,
            "grpc.server.max_pending_requests_hard_limit": _MOST_PENDING,
            "grpc.max_allowed_incoming_connections": limits.max_connections,
            "grpc.server_handshake_timeout_ms": _ms(limits.head_s),
            "grpc.max_connection_idle_ms": _ms(limits.idle_s),
            "grpc.keepalive_time_ms": _ms(limits.idle_s),  # ends connections whose client has vanished
            "grpc.so_reuseport": 0,  # or two gateways could open the same port
        }
        self._calls = Calls(buffered, log)
        self._core = taking.Core(methods, self._calls, options)

    async def open(self, host: str, port: int) -> None:
        """Opens the port. Raises ConfigError if that fails."""
        address = f"{f'[{host}]' if ':' in host else host}:{port}".encode()
        try:
            if self._tls is None:
                self.number = self._core.add_insecure_port(address)
            else:
                cert, key = (pathlib.Path(file).read_bytes() for file in self._tls)
                self.number = self._core.add_secure_port(address, grpc.ssl_server_credentials([(key, cert)]))
        except RuntimeError as e:
            raise _cannot_listen(host, port, errors.one_line(e)) from e
        if self.number == 0:
            raise _cannot_listen(host, port, "grpc does not say why")
        await self._core.start()
        self._watching = self._calls.start(self._calls.watch(self.number))

    async def close(self) -> None:
        """Answers the inferences that have arrived, and closes the port.

        1. For `lame_duck_s` seconds it goes on, and says that it is not ready.
        2. It answers the inferences that have arrived. New ones get status UNAVAILABLE. After `drain_s` seconds,
           those without an answer get it, too.
        3. It closes the port, which ends streams with status UNAVAILABLE.
        """
        service, loop = self._service, asyncio.get_running_loop()
        service.draining = True
        await asyncio.sleep(self._limits.lame_duck_s)
        service.closing = True
        began_s = quiet_since_s = loop.time()
        refused = 0
        while True:
            await asyncio.sleep(_POLL_S)
            now_s = loop.time()
            if service.refused > refused:
                refused, quiet_since_s = service.refused, now_s
            quiet = now_s > min(quiet_since_s + _QUIET_S, began_s + _MOST_QUIET_S)
            if (quiet and not service.waiting) or now_s > began_s + self._limits.drain_s:
                break
        service.cancel()
        await self._core.shutdown(_LAST_S)
        self._watching.cancel()


def _cannot_listen(host: str, port: int, why: str) -> errors.ConfigError:
    return errors.ConfigError(f"cannot listen at host {host!r} and gRPC port {port!r}: {why}; choose another port, or 0")


def _ms(seconds: float) -> int:
    """Milliseconds, as grpc takes them."""
    return min(max(int(1e3 * seconds), 1), 2**31 - 1)
