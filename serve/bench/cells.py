"""Measures the CPU time per query of the gateway, of serve/ray_app.py, and of a collector without HTTP, in alternation.

    pip install 'superserve-jax[ray,serve]' 'ray[serve]'
    python serve/bench/cells.py --ways gateway collector app
    python serve/bench/cells.py --app-python serve-env/bin/python --json runs/cells.json

Four engines sleep as long as `simulation.paper_profile` says, in the process of the gateway or of the router. So the figures
are about the way of a query to the router. CPU times are of all processes of a server, and do not depend on other programs
much.

| way | processes |
|---|---|
| gateway | one: HTTP, queue and engines |
| app | Ray Serve with its proxy and controller, a replica, a router, and Ray's own |
| collector | one that submits queries and has a collector, a router, and Ray's own |

Ray's processes also take time when there are no queries. This is measured first, and subtracted from the figures of the
gateway and the app, but not of the collector.
Requests are JSON with one small input, Poisson traffic, SLO 36 ms.
Library: remote.router, remote.collector, gateway.Gateway, simulation.traces.
"""

import dataclasses
import functools
import pathlib
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from gateway_load import children, http1, messages, running
from gateway_load.children import Child, CpuTimes

from superserve_jax import cli
from superserve_jax.simulation import traces

SLO_MS = 36.0
_IDLE_S, _CONNECTIONS, _START_S = 3.0, 64, 300.0
SHOWN = ("server_us", "idle_cores", "collector_us", "attainment", "accuracy", "p50_ms", "p99_ms", "wrong", "lost")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      ways: what to measure, see above.
      rates: queries per second of the gateway and the app.
      collector_rates: queries per second of the gateway and the collector.
      wait_ms: how long queries are gathered.
      cells: the number of routers of the app and the collector.
      repeats: how often each measurement is repeated.
      seconds: the length of one measurement.
      seed: the seed of the arrivals.
      app_python: the interpreter of an environment with Ray Serve; by default the one that runs this program.
      json: write the figures to this file.
    """

    ways: tuple[Literal["gateway", "app", "collector"], ...] = ("gateway", "app", "collector")
    rates: tuple[float, ...] = (50.0, 100.0)
    collector_rates: tuple[float, ...] = (500.0, 2000.0)
    wait_ms: float = 2.0
    cells: int = 1
    repeats: int = 3
    seconds: float = 5.0
    seed: int = 0
    app_python: pathlib.Path = pathlib.Path(sys.executable)
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "repeats", "seconds", "cells")


def loaded(child: Child, port: int, qps: float, options: Options) -> dict[str, Any]:
    """Sends requests to a server, and returns the figures. The CPU time of an idle server is subtracted."""
    due_s = traces.gamma(rate_qps=qps, cv2=1.0, duration_s=options.seconds, seed=options.seed).arrivals_s
    requests = [messages.json_request(messages.SMALL, i, SLO_MS) for i in range(messages.NUMBERS)]
    before, idle_s = CpuTimes.now(child), min(_IDLE_S, options.seconds)
    time.sleep(idle_s)
    idle_cores = (CpuTimes.now(child).child - before.child) / idle_s
    connect = functools.partial(http1.Http1, port, connections=_CONNECTIONS)
    found = running.loaded(child, connect, due_s, requests, messages.read_http)
    found["server_us"] -= 1e6 * idle_cores * options.seconds / len(due_s)
    return found | {"idle_cores": idle_cores}


Found = dict[str, dict[str, Any]]  # figures by queries per second


def each_rate(child: Child, port: int, rates: Iterable[float], options: Options) -> Found:
    """The figures of a server at each rate."""
    return {f"{qps:g}": loaded(child, port, qps, options) for qps in rates}


def of_gateway(options: Options) -> Found:
    """The figures of the gateway."""
    with children.started("child.py", "--slo-ms", SLO_MS) as child:
        return each_rate(child, child.printed()["port"], (*options.rates, *options.collector_rates), options)


def of_app(options: Options) -> Found:
    """The figures of the app of Ray Serve."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--cells", options.cells, "--wait-ms", options.wait_ms, "--port", port]
    with children.started("child_app.py", *arguments, python=options.app_python, start_s=_START_S) as child:
        return each_rate(child, port, options.rates, options)


def of_collector(options: Options) -> Found:
    """The figures of a collector without HTTP."""
    arguments = ["--cells", options.cells, "--wait-ms", options.wait_ms, "--seconds", options.seconds]
    rates = ["--rates", *options.collector_rates]
    with children.started("child_app.py", *arguments, *rates, python=options.app_python, start_s=_START_S) as child:
        return child.printed()


WAYS: dict[str, Callable[[Options], Found]] = {"gateway": of_gateway, "app": of_app, "collector": of_collector}


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for way in options.ways:
            for qps, figures in WAYS[way](options).items():
                found.setdefault(f"{way}, {qps} queries/s", []).append(figures)
    for name, runs in found.items():
        figures = {key: statistics.median(run[key] for run in runs) for key in SHOWN if key in runs[0]}
        print(f"{name:30}  " + "  ".join(f"{key} {value:.5g}" for key, value in figures.items()), flush=True)
    cli.write_results(options.json, found)


if __name__ == "__main__":
    cli.run(main)
