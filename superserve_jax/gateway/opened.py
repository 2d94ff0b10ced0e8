"""A gateway with an open port: the event loop and its thread, from opening to draining."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Mapping

import uvloop

from superserve_jax import errors
from superserve_jax.gateway.app import App
from superserve_jax.gateway.connections import Connection, Shared
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.model import ServedModel, default_name
from superserve_jax.serving.server import Server

_log = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that may wait until the loop accepts them
_FLUSH_S = 0.2  # how long the last answers may take to be sent
_JOIN_S = 5.0  # how much longer than its limits a gateway may take to close
_TICK_S = 1.0  # the longest time between two checks of the time limits


class Gateway:
    """Serves a server over the network, by the Open Inference Protocol over HTTP (see docs/serving.md).

    The event loop runs in a thread of its own, beside the workers' threads. When the constructor returns, the port is open.
    Make the server first: then its engines are warm, and the gateway is ready at once.

    Args:
      server: a server, or a dict of several servers by name.
      host: the address to listen at. "0.0.0.0" takes connections from other machines.
      port: the port; 0 takes a free one.
      name: the name of the model in paths. None takes `model.default_name`. With a dict, leave it out.
      limits: what clients may do, see `limits.Limits`.

    Attributes:
      url: such as "http://127.0.0.1:8000".
      models: the models by name.

    The servers stay the caller's: close them after the gateway.

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
        name: str | None = None,
        limits: Limits | None = None,
    ):
        if isinstance(server, Mapping) and (name is not None or not server):
            raise errors.ConfigError("give a dict of one or more servers by name, or one server and its name")
        servers = server if isinstance(server, Mapping) else {default_name(server) if name is None else name: server}
        self._limits = Limits() if limits is None else limits
        if not isinstance(self._limits, Limits):
            raise errors.ConfigError(f"limits must be gateway.Limits, got {type(limits).__name__}")
        self.models = {name: ServedModel(name, each, self._limits) for name, each in servers.items()}
        self._app = App(self.models)
        self._listener = _listen(host, port)
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self._listener.getsockname()[1]}"
        self._ended, self._failed = threading.Event(), False
        self._loop = uvloop.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="superserve-gateway", daemon=True)
        with contextlib.ExitStack() as stack:
            stack.callback(self._listener.close)
            stack.callback(self._loop.close)
            with errors.StartingThreads():
                self._thread.start()
            stack.pop_all()

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

    def wait(self) -> None:
        """Waits until another thread closes the gateway. Raises ServerClosedError if an error has ended it."""
        self._ended.wait()  # not `join`: if a signal's handler raises in it, Python 3.11 takes the thread for ended
        if self._failed:
            raise errors.ServerClosedError(f"the gateway at {self.url} ended by an error, see the log; open it again")

    def close(self) -> None:
        """Closes the port, answers the requests that have arrived, and ends the thread. It may be called twice.

        1. For `lame_duck_s` seconds it goes on, but /v2/health/ready answers 503, and each answer closes its connection.
        2. It takes the connections that wait, and closes the port.
        3. It answers the requests that have arrived. After `drain_s` seconds, requests without an answer get status 503.
        """
        self._app.draining = True
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._closing.set)
        limits = self._limits
        if not self._ended.wait(limits.lame_duck_s + limits.drain_s + _JOIN_S):
            _log.error("the gateway at %s does not end, since a request keeps its thread busy; its thread is left", self.url)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException:
            self._failed = True
            _log.exception("the gateway at %s ended by an error", self.url)
        finally:
            self._listener.close()
            self._ended.set()

    async def _serve(self) -> None:
        limits, loop = self._limits, self._loop
        shared = Shared(self._app, limits)
        listening = await loop.create_server(lambda: Connection(shared), sock=self._listener.dup(), backlog=_BACKLOG)
        ticking = loop.create_task(_tick(shared))
        await self._closing.wait()
        await asyncio.sleep(limits.lame_duck_s)
        listening.close()
        await self._accept_the_last(shared)
        self._listener.close()
        for connection in [*shared.connections]:
            connection.drain()
        await shared.emptied(limits.drain_s)
        shared.expired = True
        for connection in [*shared.connections]:
            connection.expire()
        await shared.emptied(_FLUSH_S)
        for connection in [*shared.connections]:
            connection.abort()
        ticking.cancel()

    async def _accept_the_last(self, shared: Shared) -> None:
        """Accepts the connections that the system has accepted already. Closing the port would reset them."""
        self._listener.setblocking(False)
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # none is left
                return
            with contextlib.suppress(OSError):
                await self._loop.connect_accepted_socket(lambda: Connection(shared), sock)


async def _tick(shared: Shared) -> None:
    """Checks the time limits of all connections, again and again."""
    limits = shared.limits
    pause_s = min(_TICK_S, *(each / 4 for each in (limits.head_s, limits.body_s, limits.idle_s, limits.write_s)))
    while True:
        await asyncio.sleep(pause_s)
        now_s = shared.loop.time()
        for connection in [*shared.connections]:
            connection.check(now_s)


def check_address(host: str, port: int) -> None:
    """Raises ConfigError if a gateway could not listen there now. A program checks that before it compiles for a minute."""
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError if that fails."""
    if not host:
        raise errors.ConfigError("host is empty; give an address such as 127.0.0.1, or 0.0.0.0 for all of this machine")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, TypeError) as e:
        raise errors.ConfigError(
            f"cannot listen at host {host!r} and port {port!r}: {errors.one_line(e)}; choose another port, or 0 for a free one"
        ) from e
