"""Serves a sleeping model with Ray Serve, for `serve/bench/gateway.py --peer ray`. It needs nothing of this project."""

import json
import logging
import os
import signal
import time
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from starlette.requests import Request  # pyright: ignore[reportMissingImports]

OPTIONS = json.loads(os.environ["PEER_OPTIONS"])


@serve.deployment(num_replicas=OPTIONS["workers"], max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Sleeping:
    """Sleeps by the number of queries in the batch."""

    @serve.batch(max_batch_size=OPTIONS["batch"], batch_wait_timeout_s=1e-3 * OPTIONS["wait_ms"])
    async def answer(self, numbers: list[float]) -> list[Any]:
        """Answers each query with its number and the rank of the subnet. A model blocks its replica, and so does this."""
        time.sleep(1e-3 * (OPTIONS["first_ms"] + (len(numbers) - 1) * OPTIONS["next_ms"]))
        return [[x, *[OPTIONS["rank"]] * 9] for x in numbers]

    async def __call__(self, request: Request) -> list[float]:
        """Answers one request."""
        return await self.answer((await request.json())["x"])


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": OPTIONS["port"]})
    serve.run(Sleeping.bind(), route_prefix="/")  # pyright: ignore[reportAttributeAccessIssue]
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()
