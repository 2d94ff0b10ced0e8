"""A gateway with an open port: the event loop and its thread, from opening to draining."""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import uvloop

from superserve_jax import errors, foreign
from superserve_jax.gateway import access, sockets, spans
from superserve_jax.gateway.accepting import Accepting
from superserve_jax.gateway.access_log import AccessLog, check_file
from superserve_jax.gateway.app import App
from superserve_jax.gateway.connections import Connection, Shared
from superserve_jax.gateway.folder import Folder
from superserve_jax.gateway.grpc.port import Port
from superserve_jax.gateway.limits import Limits, check_limits
from superserve_jax.gateway.live import LivePage
from superserve_jax.gateway.model import ServedModel, default_name
from superserve_jax.gateway.origins import is_local
from superserve_jax.gateway.reader import Buffered
from superserve_jax.gateway.repository import OpenModel, Repository
from superserve_jax.gateway.threads import LongWork
from superserve_jax.serving.server import Server

_log = logging.getLogger(__name__)

_OPENING_S = 1.0  # how long a closing gateway waits for the last TLS handshakes
_FLUSH_S = 0.2  # how long the last answers may take to be sent
_JOIN_S = 5.0  # how much longer than its limits a gateway may take to close
_TICK_S = 1.0  # the longest time between two checks of the time limits


class Gateway:
    """Serves a server over the network, by the Open Inference Protocol over HTTP and gRPC (see docs/network.md).

    The event loop runs in a thread of its own, beside the workers' threads. When the constructor returns, the ports are open.
    Make the server first: then its engines are warm, and the gateway is ready at once.

    Args:
      server: a server, or a dict of several servers by name. With `models_dir`, it may be empty.
      host: the address to listen at. "0.0.0.0" takes connections from other machines.
      port: the port of HTTP; 0 takes a free one.
      grpc_port: the port of gRPC; 0 takes a free one, and None opens none.
      name: the name of the model in paths. None takes `model.default_name`. With a dict, leave it out.
      limits: what clients may do, see `limits.Limits`.
      token: what clients must send in a header, `Authorization: Bearer TOKEN`. Health probes need none. None lets all in.
      tls_cert, tls_key: files in PEM with a certificate and its key; None serves without TLS.
      access_log: a file to which a line of JSON is appended for each answer, or "-" for the standard output.
      demo: whether the live page has controls that send traffic to the servers.
      models_dir: a folder. Clients may load the exports right below it, by the names of their folders, and unload models.
        Without a token, they may do so only if `host` is an address of this machine only. No server may have two names.
      open_model: opens the server of a loaded model, from the path of its export.

    Attributes:
      url: such as "http://127.0.0.1:8000".
      grpc_target: such as "127.0.0.1:8001"; None without `grpc_port`.
      models: the models by name, a `repository.Repository`. It shows at any time which ones there are.

    The servers stay the caller's: close them after the gateway. The gateway closes the servers that clients have loaded.

    Raises ConfigError if an argument is wrong, or if the port cannot be opened.

    >>> import json, urllib.request
    >>> from superserve_jax.engines.fake import FakeEngine
    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> with Server.from_engines([FakeEngine(paper_profile())], paper_profile()) as server:
    ...     with Gateway(server, port=0) as gateway:
    ...         with urllib.request.urlopen(f"{gateway.url}/v2/health/ready") as response:
    ...             json.load(response)
    {'ready': True}
    """

    def __init__(
        self,
        server: Server | Mapping[str, Server],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        grpc_port: int | None = None,
        name: str | None = None,
        limits: Limits | None = None,
        token: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        access_log: str | None = None,
        demo: bool = False,
        models_dir: str | None = None,
        open_model: OpenModel = Server,
    ):
        if isinstance(server, Mapping) and (name is not None or not (server or models_dir)):
            raise errors.ConfigError("give a dict of one or more servers by name, or one server and its name")
        servers = server if isinstance(server, Mapping) else {default_name(server) if name is None else name: server}
        self._limits = Limits() if limits is None else check_limits(limits)
        models = {name: ServedModel(name, each, self._limits) for name, each in servers.items()}
        may_change = token is not None or is_local(host)
        self.models = Repository(models, models_dir, open_model, limits=self._limits, may_change=may_change)
        self._tls = access.tls_context(tls_cert, tls_key)
        self._page = LivePage(self.models, demo=demo)
        self._access = access.Access(token, host if self._tls is None else None, self.models, self._page.public)
        self._spans, self._work = spans.find(), LongWork()
        self._app = App(self.models, self._work, self._page, self._spans)
        self._grpc_address = None if grpc_port is None else (host, grpc_port)
        self._opened = concurrent.futures.Future[int | None]()  # resolves to the port of gRPC
        self._tls_files = None if tls_cert is None or tls_key is None else (tls_cert, tls_key)
        self._ended, self._closing, self._failed = threading.Event(), asyncio.Event(), False
        self._held, self._taken = contextlib.ExitStack(), threading.Lock()  # who gets the lock closes what is held
        self._log = None
        try:
            if access_log is not None:
                self._log = AccessLog(access_log)
                self._held.callback(self._log.close)
            if grpc_port is not None:
                sockets.listen(host, grpc_port).close()
            self._listener = self._held.enter_context(sockets.listen(host, port))
            self.url = sockets.url(host, self._listener.getsockname()[1], secure=self._tls is not None)
            self._loop = uvloop.new_event_loop()
            self._held.callback(self._loop.close)
            self._thread = threading.Thread(target=self._run, name="superserve-gateway", daemon=True)
            with errors.StartingThreads():
                self._thread.start()
            number = self._opened.result()
        except BaseException:  # also an error that the handler of a signal raises, at any of these lines
            if self._taken.acquire(blocking=False):  # the thread does not run yet, and will not
                self._held.close()
            else:
                self.close()
            raise
        self.grpc_target = None if number is None else sockets.target(host, number)

    def __repr__(self) -> str:
        return f"<Gateway at {self.url}: {', '.join(self.models)}>"

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether its thread runs."""
        return not self._ended.is_set()

    def wait(self, limit_s: float | None = None) -> bool:
        """Waits until another thread closes the gateway, or for `limit_s` seconds. Returns whether it is closed.

        Raises ServerClosedError if an error has ended it.
        """
        self._ended.wait(limit_s)  # not `join`: if a signal's handler raises in it, Python 3.11 takes the thread for ended
        if self._failed:
            raise errors.ServerClosedError(f"the gateway at {self.url} ended by an error, see the log; open it again")
        return not self.is_open

    def close(self) -> None:
        """Closes the ports, answers the requests that have arrived, and ends the thread. It may be called twice.

        1. For `lame_duck_s` seconds it goes on, but /v2/health/ready answers 503, and each answer closes its connection.
        2. It takes the connections that wait, and closes the port.
        3. It answers the requests that have arrived. After `drain_s` seconds, requests without an answer get status 503.

        The same holds for gRPC. There, inferences that come after the first step get status UNAVAILABLE.
        """
        self._app.draining = True
        self._page.close()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._closing.set)
        limits = self._limits
        if not self._ended.wait(limits.lame_duck_s + limits.drain_s + _JOIN_S):
            _log.error("the gateway at %s does not end, since a request keeps its thread busy; its thread is left", self.url)
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._failed = True
            if not self._opened.done():
                self._opened.set_exception(error)
                return
            _log.exception("the gateway at %s ended by an error", self.url)
        finally:
            self._page.close()  # again, since a demo may just have started
            self.models.close()
            self._held.close()
            self._ended.set()

    async def _serve(self) -> None:
        limits, loop = self._limits, self._loop
        shared = Shared(self._app, limits, self._access, self._log)
        grpc = await self._open_grpc(shared.buffered)
        times = {"handshake_s": limits.head_s, "shutdown_s": _FLUSH_S}
        connect = functools.partial(Connection, shared)
        accepting = Accepting(self._listener, connect, most=limits.max_connections, tls=self._tls, **times)
        self._page.start()
        ticking = loop.create_task(_tick(shared))
        self._opened.set_result(None if grpc is None else grpc.number)
        await self._closing.wait()
        self.models.end()
        closing_grpc = None if grpc is None else loop.create_task(grpc.close())
        await asyncio.sleep(limits.lame_duck_s)
        accepting.stop()
        end_s = time.monotonic() + limits.drain_s
        if accepting.opening:
            await asyncio.wait([*accepting.opening], timeout=min(_OPENING_S, limits.drain_s))
        shared.closing = True
        for connection in [*shared.connections]:
            connection.drain()
        await shared.emptied(end_s - time.monotonic())
        shared.expired = True
        for connection in [*shared.connections]:
            connection.expire()
        await shared.emptied(_FLUSH_S)
        for connection in [*shared.connections]:
            connection.abort()
        for task in (ticking, *accepting.opening):
            task.cancel()
        if closing_grpc is not None:
            await closing_grpc

    async def _open_grpc(self, buffered: Buffered) -> Port | None:
        if self._grpc_address is None:
            return None
        told = self._access.is_right, self._tls_files, self._log, self._spans
        port = Port(self.models, self._limits, buffered, self._work, *told)
        await port.open(*self._grpc_address)
        return port


async def _tick(shared: Shared) -> None:
    """Checks the time limits of all connections, again and again."""
    limits = shared.limits
    pause_s = min(_TICK_S, *(each / 4 for each in (limits.head_s, limits.body_s, limits.idle_s, limits.write_s)))
    while True:
        await asyncio.sleep(pause_s)
        now_s = time.monotonic()
        for connection in [*shared.connections]:
            try:
                connection.check(now_s)
            except Exception as e:  # the limits hold for the other connections
                foreign.log(_log, logging.ERROR, "the time limits of a connection cannot be checked", error=e)
                connection.abort()


def check_options(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    token: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    limits: Limits | None = None,
    access_log: str | None = None,
    models_dir: str | None = None,
    **_: Any,
) -> None:
    """Raises ConfigError if a gateway with these options could not open now. Ask before you compile for a minute."""
    if limits is not None:
        check_limits(limits)
    if models_dir is not None:
        Folder(models_dir)
    access.Access(token)
    access.tls_context(tls_cert, tls_key)
    if access_log is not None:
        check_file(access_log)
    with contextlib.ExitStack() as stack:
        for each in (port, grpc_port):
            if each is not None:
                stack.enter_context(sockets.listen(host, each))
