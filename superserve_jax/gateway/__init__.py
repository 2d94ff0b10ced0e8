"""The network API of a server: the Open Inference Protocol (version 2) over HTTP and gRPC. No jax.

    with ss.Server("digits", slo_ms=36) as server, gateway.Gateway(server, port=0) as opened:
        print(opened.url)

| to learn about | read |
|---|---|
| the path of a request, and all paths | `app.py` |
| bytes to arrays, and replies to bytes (no sockets) | `tensors.py`, `requests.py`, `replies.py` |
| the models, which clients may load and unload | `repository.py`, `folder.py` |
| a server under its name; metadata, configuration, statistics | `model.py`, `documents.py` |
| HTTP: bytes to requests, their order, answers, time limits | `reader.py`, `connections.py`, `messages.py`, `bodies.py` |
| what clients may do; tokens and TLS; errors and their statuses | `limits.py`, `access.py`, `failures.py` |
| the same over gRPC | `grpc/` |
| what is told about requests: the access log, and spans of OpenTelemetry | `access_log.py`, `spans.py` |
| the live page: its files, figures, streams, and the demo | `live.py`, `sampling.py`, `events.py`, `demo.py` |
| the event loop and its thread, opening and closing; new connections | `opened.py`, `accepting.py` |

It needs some packages: pip install 'superserve-jax[serve]'. `Limits` works without them.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from superserve_jax import errors
from superserve_jax.gateway.limits import Limits

if TYPE_CHECKING:
    from superserve_jax.gateway.access import read_token
    from superserve_jax.gateway.model import named
    from superserve_jax.gateway.opened import Gateway, check_options

# The modules of these names.
_LATE = {"Gateway": "opened", "check_options": "opened", "named": "model", "read_token": "access"}
__all__ = ["Gateway", "GatewayImportError", "Limits", "check_options", "named", "read_token"]


class GatewayImportError(errors.SuperServeError, ImportError):
    """A package that the gateway needs is not installed."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    for package in ("httptools", "uvloop", "grpc", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise GatewayImportError(f"the gateway needs the package '{package}': pip install 'superserve-jax[serve]'")
    return getattr(importlib.import_module(f"superserve_jax.gateway.{_LATE[name]}"), name)
