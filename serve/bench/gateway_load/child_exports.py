"""Serves two exports behind one gateway, in a process of its own. serve/bench/two_models.py starts it.

When the port is open, it prints a line of JSON with its number, and with the input and the throughput of each model. SIGTERM
ends it.
"""

import argparse
import contextlib
import json
import signal

from superserve_jax.gateway import Gateway
from superserve_jax.serving.server import Server


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", nargs=2)
    parser.add_argument("--slo-ms", type=float, default=36.0)
    options = parser.parse_args()
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before any thread starts, so that only `sigwait` gets them
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, export in zip(("first", "second"), options.exports, strict=True):
            servers[name] = stack.enter_context(Server(export, slo_ms=options.slo_ms))
        gateway = stack.enter_context(Gateway(servers, port=0))
        models = {}
        for name, server in servers.items():
            profile = server.profile
            qps = profile.throughput_qps(profile.rows[0].subnet)
            models[name] = {"shape": server.inputs.shape, "dtype": str(server.inputs.dtype), "qps": qps}
        print(json.dumps({"port": int(gateway.url.rsplit(":", 1)[1]), "models": models}), flush=True)
        signal.sigwait(stops)


if __name__ == "__main__":
    main()
