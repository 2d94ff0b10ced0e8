"""Serves sleeping engines behind a gateway, in a process of its own. It is a program that serve/bench/gateway*.py start.

When the ports are open, it prints a line of JSON with their numbers. SIGTERM ends it. With `--trace`, no port is opened: it
replays a trace in this process, and prints a line of JSON with the figures.
"""

import argparse
import contextlib
import inspect
import json
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np

from gateway_load.children import CpuTimes
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.gateway import Gateway
from superserve_jax.loadtest import loadgen
from superserve_jax.profile import Profile
from superserve_jax.serving.server import Server
from superserve_jax.simulation.paper_profile import paper_profile
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet

OUTPUTS = 10
PERIOD_MS = 1.0
"""How often the generator of `loadtest.loadgen` wakes up. So it may be late by so much."""


class Sleeping(FakeEngine):
    """Sleeps as long as the profile's formula says for the number of queries in the batch, and not for the padded batch.

    The outputs are the first value of the input, and then the subnet's rank.
    """

    def __init__(self, profile: Profile, **options: Any):
        super().__init__(profile, **options)
        seconds = {row.subnet: 1e-3 * np.array(row.latency_ms) for row in profile.rows}
        numbers = np.arange(profile.max_batch + 1)
        self._seconds = {subnet: np.interp(numbers, profile.batch_sizes, s).tolist() for subnet, s in seconds.items()}

    def _expected_s(self, subnet: Subnet, batch_size: int, inputs: list[np.ndarray]) -> float:
        return self._seconds[subnet][len(inputs)]

    def _outputs(self, subnet: Subnet, inputs: list[np.ndarray]) -> list[Any]:
        outputs = np.full((len(inputs), OUTPUTS), self._rank[subnet], np.float32)
        outputs[:, 0] = [x.item(0) for x in inputs]
        return [*outputs]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subnet", type=int, help="serve only this subnet, by its rank")
    parser.add_argument("--shape", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="int32")
    parser.add_argument("--slo-ms", type=float, default=36.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--max-queue", type=int, default=100_000)
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--trace", help="an .npy file with times of arrival")
    return parser.parse_args()


def has_grpc() -> bool:
    """Whether the gateway has a port of gRPC."""
    return "grpc_port" in inspect.signature(Gateway).parameters


def served(
    subnet: int | None = None,
    *,
    shape: Sequence[int] = (1,),
    dtype: str = "int32",
    slo_ms: float = 36.0,
    workers: int = 4,
    max_queue: int = 100_000,
    speed: float = 1.0,
) -> Server:
    """A server with sleeping engines. The arguments are the options of this program."""
    profile = paper_profile()
    if subnet is not None:
        profile = Profile(profile.batch_sizes, (profile.rows[subnet],), device=profile.device)
    if speed != 1:
        profile = profile.scaled(1 / speed)
    tensor = {"input_shape": tuple(shape), "input_dtype": dtype}
    engines = [Sleeping(profile, name=f"fake:{i}", **tensor) for i in range(workers)]
    return Server.from_engines(engines, profile, slo_ms=slo_ms, max_queue=max_queue)


def in_process(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    """Replays a trace without a network."""
    trace = Trace(np.load(options.trace), options.slo_ms)
    inputs = [np.full(options.shape, i, options.dtype) for i in range(100)]
    before = CpuTimes.now(None)
    run = loadgen.replay(server, trace, [inputs[i % 100] for i in range(len(trace))])
    used = CpuTimes.now(None).since(before, len(trace))
    latency_ms = 1e3 * (run.finish_s - run.arrival_s)
    answered = latency_ms[np.isfinite(latency_ms)]
    return {
        "queries": len(trace),
        "attainment": float(run.met.mean()),
        "accuracy": float(run.accuracy[run.met].mean()) if run.met.any() else 0.0,
        "p50_ms": float(np.median(answered)),
        "p99_ms": float(np.percentile(answered, 99)),
        "lateness_p99_ms": float(1e3 * np.percentile(run.lateness_s, 99)),
        "period_ms": PERIOD_MS,
        "other_cores": used["other_cores"],
    }


def main() -> None:
    """The program."""
    options = parse()
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before any thread starts, so that only `sigwait` gets them
    with contextlib.ExitStack() as stack:
        names = ("subnet", "shape", "dtype", "slo_ms", "workers", "max_queue", "speed")
        server = stack.enter_context(served(**{name: getattr(options, name) for name in names}))
        if options.trace:
            print(json.dumps(in_process(options, server)), flush=True)
            return
        more: dict[str, Any] = {"grpc_port": 0} if options.grpc else {}
        gateway = stack.enter_context(Gateway(server, port=0, name="supernet", **more))
        ports = {"port": int(gateway.url.rsplit(":", 1)[1])}
        if gateway.grpc_target is not None:
            ports["grpc_port"] = int(gateway.grpc_target.rsplit(":", 1)[1])
        print(json.dumps(ports), flush=True)
        signal.sigwait(stops)


if __name__ == "__main__":
    main()
