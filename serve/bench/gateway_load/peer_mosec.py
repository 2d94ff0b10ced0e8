"""Serves a sleeping model with mosec, for `serve/bench/gateway.py --peer mosec`. It needs nothing of this project."""

import json
import os
import sys
import time
from typing import Any

import mosec  # pyright: ignore[reportMissingImports]

OPTIONS = json.loads(os.environ["PEER_OPTIONS"])  # mosec starts its workers anew, and they read this file again


class Sleeping(mosec.Worker):
    """Sleeps by the number of queries in the batch."""

    def forward(self, data: list[dict[str, float]]) -> list[Any]:
        """Answers each query with its number and the rank of the subnet."""
        time.sleep(1e-3 * (OPTIONS["first_ms"] + (len(data) - 1) * OPTIONS["next_ms"]))
        return [[one["x"], *[OPTIONS["rank"]] * 9] for one in data]


if __name__ == "__main__":
    patient = ("--capacity", "100000", "--timeout", "60000", "--log-level", "error")
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(OPTIONS["port"]), *patient]
    server = mosec.Server()
    batches = {"max_batch_size": OPTIONS["batch"], "max_wait_time": OPTIONS["wait_ms"]}
    server.append_worker(Sleeping, num=OPTIONS["workers"], timeout=60, **batches)
    server.run()
