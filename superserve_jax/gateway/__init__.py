"""The network API of a server: the Open Inference Protocol (version 2) over HTTP. No jax.

    with ss.Server("digits", slo_ms=36) as server, gateway.Gateway(server, port=0) as opened:
        print(opened.url)

Start with `app.py`, the path of a request. `tensors.py`, `requests.py` and `replies.py` are the protocol without sockets:
bytes to arrays, and replies to bytes. `model.py` has a server under its name. `documents.py` describes a model: its metadata,
configuration and statistics. `bodies.py` reads and compresses bodies. `failures.py` maps errors to statuses. `opened.py` opens
the port. It needs some packages: pip install 'superserve-jax[serve]'.
"""

import importlib.util

from superserve_jax import errors


class GatewayImportError(errors.SuperServeError, ImportError):
    """A package that the gateway needs is not installed."""


for _name in ("uvicorn", "httptools", "uvloop", "prometheus_client"):
    if importlib.util.find_spec(_name) is None:
        raise GatewayImportError(f"the gateway needs the package '{_name}': pip install 'superserve-jax[serve]'")

from superserve_jax.gateway.opened import Gateway, check_address  # noqa: E402 - after the check of the packages
from superserve_jax.gateway.requests import RequestError  # noqa: E402

__all__ = ["Gateway", "GatewayImportError", "RequestError", "check_address"]
