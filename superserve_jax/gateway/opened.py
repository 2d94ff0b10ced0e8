"""A gateway with an open port: the event loop and its thread, from opening to draining."""

import asyncio
import logging
import socket
import threading
from collections.abc import Mapping

import uvicorn
import uvloop

from superserve_jax import errors
from superserve_jax.gateway.app import App
from superserve_jax.gateway.connections import Connection
from superserve_jax.gateway.model import ServedModel, default_name
from superserve_jax.serving.server import Server

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
_BACKLOG = 2048  # connections that may wait until the loop accepts them
_KEEP_ALIVE_S = 75  # an idle connection is closed after this time; clients of the protocol keep theirs for a minute


class Gateway:
    """Serves a server over the network, by the Open Inference Protocol over HTTP (see docs/serving.md).

    The event loop runs in a thread of its own, beside the workers' threads. When the constructor returns, the port is open.
    Make the server first: then its engines are warm, and the gateway is ready at once.

    Args:
      server: a server, or a dict of several servers by name.
      host: the address to listen at. "0.0.0.0" takes connections from other machines.
      port: the port; 0 takes a free one.
      name: the name of the model in paths. None takes `model.default_name`. With a dict, leave it out.
      max_body_bytes: the limit of a request's body, as it is sent and inflated.
      drain_s: how long `close` waits for requests that are being answered.

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
        max_body_bytes: int = MAX_BODY_BYTES,
        drain_s: float = 10.0,
    ):
        if isinstance(server, Mapping) and (name is not None or not server):
            raise errors.ConfigError("give a dict of one or more servers by name, or one server and its name")
        servers = server if isinstance(server, Mapping) else {default_name(server) if name is None else name: server}
        if not isinstance(max_body_bytes, int) or max_body_bytes < 1:
            raise errors.ConfigError(f"max_body_bytes must be a whole number from 1 up, got {max_body_bytes!r}")
        if not isinstance(drain_s, int | float) or not 0 <= drain_s < threading.TIMEOUT_MAX:
            raise errors.ConfigError(f"drain_s must be a number of seconds from 0 up, got {drain_s!r}")
        self.models = {name: ServedModel(name, each) for name, each in servers.items()}
        self._app = App(self.models, max_body_bytes=max_body_bytes)
        listener = _listen(host, port)
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_s,  # pyright: ignore[reportArgumentType] - asyncio.wait_for takes a float
        )
        self._uvicorn = uvicorn.Server(config)
        self._listener, self._ended = listener, threading.Event()
        self._thread = threading.Thread(target=self._run, name="superserve-gateway", daemon=True)
        with errors.StartingThreads():
            self._thread.start()

    def __repr__(self) -> str:
        return f"<Gateway at {self.url}: {', '.join(self.models)}>"

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Waits until another thread closes the gateway. Raises ServerClosedError if an error has ended it."""
        self._ended.wait()  # not `join`: if a signal's handler raises in it, Python 3.11 takes the thread for ended
        if not self._app.draining:
            raise errors.ServerClosedError(f"the gateway at {self.url} ended by an error, see the log; open it again")

    def close(self) -> None:
        """Closes the port, answers the requests that have arrived, and ends the thread. It may be called twice.

        While it waits, /v2/health/ready answers 503. After `drain_s` seconds, requests without an answer get status 503.
        """
        self._app.draining = True
        self._uvicorn.should_exit = True
        self._ended.wait()
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._uvicorn.serve(sockets=[self._listener]))
        except BaseException:
            _log.exception("the gateway at %s ended by an error", self.url)
        finally:
            self._listener.close()
            self._ended.set()


def check_address(host: str, port: int) -> None:
    """Raises ConfigError if a gateway could not listen there now. A program checks that before it compiles for a minute."""
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError if that fails."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, TypeError) as e:
        raise errors.ConfigError(
            f"cannot listen at host {host!r} and port {port!r}: {errors.one_line(e)}; choose another port, or 0 for a free one"
        ) from e
