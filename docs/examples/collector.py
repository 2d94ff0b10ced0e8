"""Two routers that are actors of Ray, and queries that are gathered for a millisecond."""

import asyncio
import functools

import numpy as np
import ray

from superserve_jax import remote


async def ask():
    """Starts the routers, and asks them."""
    open_cell = functools.partial(remote.open_cell, "runs/demo/export", 8, device={"num_gpus": 1}, slo_ms=36)
    routers = [remote.start_router(open_cell, name=f"cell-{i}") for i in range(2)]
    collector = remote.Collector(routers, wait_ms=1, slo_ms=36)
    images = np.zeros((100, 32, 32, 1), np.uint8)
    for reply in await asyncio.gather(*map(collector.submit, images)):
        print(reply)


ray.init("auto")
asyncio.run(ask())
