"""Serves a sleeping model with LitServe, for `serve/bench/gateway.py --peer litserve`. It needs nothing of this project."""

import json
import os
import time

import litserve  # pyright: ignore[reportMissingImports]

OPTIONS = json.loads(os.environ["PEER_OPTIONS"])


class Sleeping(litserve.LitAPI):
    """Sleeps by the number of queries in the batch. Answers each query with its number and the rank of the subnet."""

    def setup(self, device: str) -> None:
        """There is nothing to load."""

    def decode_request(self, request: dict[str, float]) -> float:
        """The number of a query."""
        return request["x"]

    def batch(self, inputs: list[float]) -> list[float]:
        """A batch is a list."""
        return inputs

    def predict(self, x: list[float] | float) -> list[float] | float:
        """Sleeps."""
        count = len(x) if isinstance(x, list) else 1
        time.sleep(1e-3 * (OPTIONS["first_ms"] + (count - 1) * OPTIONS["next_ms"]))
        return x

    def unbatch(self, output: list[float]) -> list[float]:
        """The results of a batch."""
        return output

    def encode_response(self, output: float) -> list[float]:
        """The answer to one query."""
        return [output, *[OPTIONS["rank"]] * 9]


if __name__ == "__main__":
    api = Sleeping(max_batch_size=OPTIONS["batch"], batch_timeout=1e-3 * OPTIONS["wait_ms"])
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=OPTIONS["workers"], timeout=60)
    server.run(host="127.0.0.1", port=OPTIONS["port"], generate_client_file=False, log_level="error", access_log=False)
