"""What serve/bench/gateway.py measures: servers, inputs, traffic, and the bounds that the figures must meet."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from gateway_load.peers import PEERS
from superserve_jax.simulation import traces
from superserve_jax.simulation.paper_profile import paper_profile
from superserve_jax.simulation.traces import Trace

SLO_MS = 36.0
CALM_QPS, BURST_QPS, STEP_S, BURST_EVERY = 600.0, 3000.0, 1.0, 4
CV2 = 4.0
OWN = ("HTTP", "gRPC")
"""The servers that are this project's gateway."""
IN_PROCESS, SIMULATED = "in process", "simulation"
RATE_STEP = 1.12
TOP_RATES = {"smallest": 8199.0, "largest": 1337.0}
"""A rate on the grid of each subnet. Two neighbours on the grid differ by the factor `RATE_STEP`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A server under one traffic.

    Args:
      server: "HTTP" or "gRPC" for this project's gateway, "in process" for its server without a network, "simulation" for the
        simulator, in which nothing but the engines takes time, or a peer's name.
      wire: the form of a request: "json" or "binary".
      given: the input: "number" or "image" (32x32x1).
      subnet: the rank of the only subnet that is served; None for switching by the default policy.
      qps: mean rate of bursty traffic; 0 for bursts from 600 to 3,000 queries/s.
    """

    server: str
    wire: str
    given: str
    subnet: int | None
    qps: float

    @property
    def name(self) -> str:
        """Words that name the case, for tables and for --only."""
        traffic = f"{self.qps:.0f}/s" if self.qps else "bursts"
        form = f" {self.wire}" if self.server in OWN else ""
        return f"{self.server}{form}, {self.given}, {subnet_name(self.subnet)}, {traffic}"

    @property
    def is_peer(self) -> bool:
        """Whether it is a server of another project."""
        return self.server in PEERS

    def trace(self, *, seconds: float, seed: int) -> Trace:
        """The traffic. Bursts are the last of every four steps. A step is a second, or less so that there are four."""
        if self.qps:
            rates = {"base_qps": self.qps / 3, "burst_qps": 2 * self.qps / 3}
            return traces.bursty(**rates, cv2=CV2, duration_s=seconds, slo_ms=SLO_MS, seed=seed)
        step_s = min(STEP_S, seconds / BURST_EVERY)
        calm, burst = [CALM_QPS] * (BURST_EVERY - 1), [BURST_QPS]
        steps = (calm + burst) * max(round(seconds / step_s / BURST_EVERY), 1)
        return traces.steps(rates_qps=steps, step_s=step_s, cv2=CV2, slo_ms=SLO_MS, seed=seed)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A figure of a case, and what it must be.

    Args:
      case: the case.
      figure: the name of the figure.
      sign: "at least" or "at most".
      bound: the value.
    """

    case: Case
    figure: str
    sign: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a value meets the bound. NaN does not."""
        return value >= self.bound if self.sign == "at least" else value <= self.bound


def subnet_name(rank: int | None) -> str:
    """How a subnet is called in tables: its accuracy, or "switching"."""
    if rank is None:
        return "switching"
    rows = paper_profile().rows
    return {0: "smallest", len(rows) - 1: "largest"}.get(rank, f"fixed {100 * rows[rank].accuracy:.2f} %")


LARGEST = len(paper_profile().rows) - 1
_http = functools.partial(Case, "HTTP")
_grpc = functools.partial(Case, "gRPC", "binary")

BOUNDS = (
    Bound(_http("json", "number", 0, 8199), "attainment", "at least", 0.99),
    Bound(_http("json", "number", 0, 8199), "server_us", "at most", 85),
    Bound(_http("binary", "number", 0, 8199), "attainment", "at least", 0.99),
    Bound(_http("binary", "number", 0, 8199), "server_us", "at most", 85),
    Bound(_http("binary", "image", 0, 8199), "attainment", "at least", 0.99),
    Bound(_http("json", "image", 0, 7321), "attainment", "at least", 0.99),
    Bound(_http("json", "number", LARGEST, 1194), "attainment", "at least", 0.995),
    Bound(_http("json", "number", LARGEST, 1337), "attainment", "at least", 0.99),
    Bound(_http("json", "number", None, 0), "attainment", "at least", 0.999),
    Bound(_http("json", "number", None, 0), "accuracy", "at least", 0.792),
    Bound(_http("json", "number", 0, 2000), "p50_ms", "at most", 3),
    Bound(_grpc("number", 0, 2357), "attainment", "at least", 0.99),
    Bound(_grpc("number", None, 0), "attainment", "at least", 0.995),
    Bound(_grpc("number", None, 0), "accuracy", "at least", 0.792),
    Bound(_grpc("number", 0, 2000), "p50_ms", "at most", 5),
)


def of_bounds(peers: Iterable[str]) -> list[Case]:
    """The cases that have bounds, and the same traffic in process, in the simulation and at the peers."""
    own = list(dict.fromkeys(bound.case for bound in BOUNDS))
    compared = (IN_PROCESS, SIMULATED, *peers)
    others = [Case(server, "json", "number", 0, 8199) for server in compared]
    others += [Case(server, "json", "number", LARGEST, qps) for server in compared for qps in (1066, 1194, 1337)]
    others += [Case(server, "json", "number", 0, 2000) for server in peers]
    return [*own, *others, *(Case(server, "json", "number", None, 0) for server in (IN_PROCESS, SIMULATED))]


def of_bursts(peers: Iterable[str]) -> list[Case]:
    """Bursts with switching, and with each subnet alone: at the first peer, and here."""
    subnets = range(len(paper_profile().rows))
    servers = ("HTTP", *[*peers][:1])
    return [Case("HTTP", "json", "number", None, 0)] + [Case(s, "json", "number", i, 0) for s in servers for i in subnets]


def of_rates(peers: Iterable[str], *, grpc: bool) -> dict[tuple[str, str], list[Case]]:
    """For each server and each of two subnets, the cases of rising rates among which the highest one at 0.99 is searched."""
    made = {}
    forms = [(IN_PROCESS, "json"), ("HTTP", "json"), ("HTTP", "binary"), *([("gRPC", "binary")] if grpc else [])]
    for server, wire in (*forms, *((peer, "json") for peer in peers)):
        for which, subnet in (("smallest", 0), ("largest", LARGEST)):
            rates = [TOP_RATES[which] * RATE_STEP**step for step in range(-20, 3)]
            name = f"{server} {wire}" if server in OWN else server
            made[name, which] = [Case(server, wire, "number", subnet, round(qps)) for qps in rates]
    return made


def figure_of(runs: Mapping[str, Any], case: Case, figure: str) -> float:
    """A figure of a case's result; NaN if it was not measured."""
    value = runs.get(case.name, {}).get(figure)
    return float("nan") if value is None else float(value)
