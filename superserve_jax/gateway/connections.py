"""Connections of HTTP: uvicorn's protocol, which also cancels the queries of a client that goes away."""

import logging
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_log = logging.getLogger(__name__)
_log.setLevel(logging.ERROR)  # uvicorn warns of every malformed request, which any client can send without end

_GRACE_S = 0.1
"""How long an idle connection stays open when the gateway closes. A request may be on its way."""


class Connection(HttpToolsProtocol):
    """One connection.

    uvicorn copies `app_state` into the ASGI state of each request. So the application finds the connection's list of queries
    there, without a task that waits for a disconnect.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.logger = _log
        self._queries: list[Any] = []
        self._answering: RequestResponseCycle | None = None  # the request that is being answered
        self.app_state = {"queries": self._queries}

    def connection_made(self, transport: Any) -> None:
        """Opens the connection. If the gateway closes already, it serves one request."""
        super().connection_made(transport)
        if getattr(self.app, "draining", False):
            self.shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the queries of the client that has gone."""
        super().connection_lost(exc)
        if self._answering is not None:
            self._answering.disconnected = True  # uvicorn marks only the last one of several pipelined requests
        for query in [*self._queries]:
            query.cancel()

    def shutdown(self) -> None:
        """Closes the connection after its request or, if it has none, in a moment."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self.loop.call_later(_GRACE_S, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, and closes the connection."""
        body = msgspec.json.encode({"error": f"{msg.rstrip('.')}; send HTTP/1.1"})
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        self.transport.close()

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
