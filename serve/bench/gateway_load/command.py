"""Runs `superserve serve` with sleeping engines in place of an export's. serve/bench/gateway_stops.py starts it.

Only `superserve_jax.Server` is replaced. So the ports, the signals and the end are those of the command.
"""

import sys
from typing import Any
from unittest import mock

import superserve_jax
from gateway_load import child
from superserve_jax import commands
from superserve_jax.serving.server import Server


def sleeping(export: str, *, slo_ms: float, **_: Any) -> Server:
    """Takes the place of `superserve_jax.Server`."""
    return child.served(slo_ms=slo_ms)


if __name__ == "__main__":
    grpc = ("--grpc-port", "0") if child.has_grpc() else ()
    sys.argv[1:1] = ["serve", "supernet=digits", "--port", "0", *grpc]
    with mock.patch.object(superserve_jax, "Server", sleeping, create=True):
        commands.main()
