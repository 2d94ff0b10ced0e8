"""Serves sleeping engines by serve/ray_app.py, in processes of Ray. It is a program that serve/bench/cells.py starts.

When Serve is ready, it prints a line of JSON with its port. SIGTERM ends it. With `--rates`, it has no Serve. It submits
queries to the routers by a collector in this process, and prints a line of JSON with the figures at each rate.
"""

import argparse
import asyncio
import functools
import json
import logging
import os
import time
from typing import Any

import numpy as np
import psutil

from gateway_load import child, messages
from serve import ray_app
from superserve_jax import remote
from superserve_jax.simulation import traces

_WARM_UP_S = 1.0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=1.0)
    parser.add_argument("--slo-ms", type=float, default=36.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=4.0)
    return parser.parse_args()


def cpu_s() -> dict[str, float]:
    """The CPU time of this process so far, and of all processes that it has started."""
    own = psutil.Process()
    below = sum(sum(process.cpu_times()[:4]) for process in own.children(recursive=True))
    return {"collector": sum(own.cpu_times()[:2]), "others": below}


async def ask(collector: remote.Collector, due_s: np.ndarray) -> list[Any]:
    """Submits each query when it is due, and returns the replies."""
    inputs = [np.array([i], np.int32) for i in range(messages.NUMBERS)]
    start_s, tasks = time.monotonic(), []
    for i, due in enumerate(due_s.tolist()):
        if (left_s := start_s + due - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        tasks.append(asyncio.create_task(collector.submit(inputs[i % messages.NUMBERS])))
    replies = await asyncio.gather(*tasks)
    wrong = [i for i, reply in enumerate(replies) if reply.output[0] != i % messages.NUMBERS]
    assert not wrong, f"wrong answers to the queries {wrong[:5]}"
    return replies


async def collected(options: argparse.Namespace, routers: list[Any]) -> dict[str, Any]:
    """The figures of a collector in this process, at each rate."""
    await asyncio.gather(*(router.about() for router in routers))
    collector = remote.Collector(routers, slo_ms=options.slo_ms, wait_ms=options.wait_ms)
    await ask(collector, np.linspace(0, _WARM_UP_S, 200))
    return {f"{qps:g}": await at_rate(collector, qps, options.seconds) for qps in options.rates}


async def at_rate(collector: remote.Collector, qps: float, seconds: float) -> dict[str, Any]:
    """The figures at one rate."""
    due_s = traces.gamma(rate_qps=qps, cv2=1.0, duration_s=seconds).arrivals_s
    before = cpu_s()
    replies = await ask(collector, due_s)
    used = {name: 1e6 * (now - before[name]) / len(replies) for name, now in cpu_s().items()}
    met, latency_ms = np.array([reply.met_slo for reply in replies]), np.array([reply.latency_ms for reply in replies])
    return {
        "queries": len(replies),
        "server_us": used["collector"] + used["others"],
        "collector_us": used["collector"],
        "attainment": float(met.mean()),
        "accuracy": float(np.mean([reply.accuracy for reply in replies])),
        "p50_ms": float(np.percentile(latency_ms, 50)),
        "p99_ms": float(np.percentile(latency_ms, 99)),
    }


def main() -> None:
    """The program."""
    options = parse()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    name, cells = messages.MODEL, options.cells
    chosen = {"replicas": options.replicas, "wait_ms": options.wait_ms, "slo_ms": options.slo_ms, "port": options.port}
    of_app = ray_app.Options(cells=cells, name=name, **chosen)
    opening = functools.partial(child.served, slo_ms=options.slo_ms)
    try:
        if options.rates:
            found = asyncio.run(collected(options, ray_app.routers(of_app, opening)))
            print(json.dumps(found), flush=True)
        else:
            ray_app.run(of_app, ray_app.bound(of_app, opening))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
