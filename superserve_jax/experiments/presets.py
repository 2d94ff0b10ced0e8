"""The evaluation as data: which traffic, policies and clusters make up each preset of `superserve compare`. No jax.

One file because it is one table, with the types of its entries.

The settings come from the paper's text (Section 6). If the text does not give a setting, a docstring states our choice.
A scale of s makes the device s times slower than in the profile. The stand-in for the paper's profile
(`simulation.paper_profile`) has about twice the paper's throughput. At a scale of 1.9, eight workers carry about 2,000 to
9,000 queries/s, as in the paper's text. So the traffic is about the same load as in the paper.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import expand
from superserve_jax.simulation import azure, recorded, traces
from superserve_jax.simulation.cluster import Cluster, Outage, Stall
from superserve_jax.simulation.traces import Trace

SLO_MS = 36.0
DURATION_S = 60.0
WORKERS = 8
SCALES = (1.0, 1.9)
DENSE = 500  # subnets in the profile on which decisions are timed
LATENCY_BUCKETS = (4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 48, 64)
"""The numbers of latency buckets that the preset "slowdown" tries."""

_PROCESSES = {"bursty": traces.bursty, "accelerating": traces.accelerating, "gamma": traces.gamma, "azure": azure.trace}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The recipe of a trace: a random process with its parameters. `create` makes the trace.

    Args:
      name: for tables and plots.
      process: "bursty", "accelerating" or "gamma" (see `simulation.traces`), "azure" (see `simulation.azure.trace`), or
        "recorded" (see `simulation.recorded.trace`).
      options: arguments of that function, as (name, value) pairs.
      load: for "gamma", instead of the option rate_qps: the rate as a fraction of what all workers can serve with the fastest
        subnet.
      group: the number of queries that a client sends at once.
    """

    name: str
    process: str
    options: tuple[tuple[str, Any], ...] = ()
    load: float | None = None
    group: int = 1

    @property
    def random(self) -> bool:
        """Whether the trace depends on the seed."""
        return self.process != "recorded" and dict(self.options).get("cv2", 1.0) != 0

    def create(
        self, seed: int, *, capacity_qps: float = 0.0, duration_s: float = DURATION_S, maf_trace: str | None = None
    ) -> Trace:
        """Makes the trace.

        Args:
          seed: the seed of the arrivals.
          capacity_qps: the queries per second that all workers can serve with the fastest subnet. Only `load` needs it.
          duration_s: the length of the trace.
          maf_trace: a CSV file of Azure Functions 2019, for "azure".

        Raises DataError if "azure" has no file.
        """
        if self.process == "recorded":
            recording = {"slo_ms": SLO_MS, **dict(self.options)}
            return dataclasses.replace(recorded.trace(**recording, quiet=True), name=self.name)
        options: dict[str, Any] = {"duration_s": duration_s, "slo_ms": SLO_MS, "seed": seed, **dict(self.options)}
        if self.load is not None:
            options["rate_qps"] = self.load * capacity_qps
        if self.process == "azure":
            if maf_trace is None:
                raise errors.DataError(
                    f"'{self.name}' needs the invocations of Azure Functions 2019: download azurefunctions-dataset2019 from "
                    "github.com/Azure/AzurePublicDataset and name its file invocations_per_function_md.anon.d01.csv, or a "
                    "sample of it, with --maf-trace"
                )
            options["path"] = maf_trace
        trace = _PROCESSES[self.process](**options)
        return dataclasses.replace(trace.in_groups(self.group) if self.group > 1 else trace, name=self.name)


def bursty(burst_qps: float, cv2: float) -> Traffic:
    """The paper's bursty traffic: 1500 queries/s plus a gamma process."""
    return Traffic(f"1500+{burst_qps:g} cv2={cv2:g}", "bursty", (("burst_qps", burst_qps), ("cv2", cv2)))


_FROM_QPS, _RAMP_AT_S = 2500.0, 10.0  # of `traces.accelerating`


def accelerating(to_qps: float, qps_per_s: float) -> Traffic:
    """The paper's accelerating traffic, from 2500 to `to_qps` queries/s. It rises after 10 s; the paper gives no time."""
    return Traffic(f"2500-{to_qps:g} at {qps_per_s:g}", "accelerating", (("to_qps", to_qps), ("qps_per_s", qps_per_s)))


def steady(load: float) -> Traffic:
    """Evenly spaced arrivals. `load` is a fraction of what the workers can serve with the fastest subnet."""
    return Traffic(f"steady, {100 * load:g} % load", "gamma", (("cv2", 0.0),), load)


MAF = Traffic("MAF 6400", "azure", (("mean_qps", 6400.0),))
"""A day of Azure Functions, shrunk to a minute or two, with a mean of 6400 queries/s."""
HARDEST = bursty(5550.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Runs every policy on every traffic, on every cluster, at every scale.

    Args:
      traffics: the traffics to serve.
      policies: names for `policies.create`. "fixed:all" means every subnet of the profile, fixed.
      clusters: the clusters to serve them with.
      scales: how many times slower the device is than in the profile.
      sustained: whether to search for the highest sustained rate (see `runner.SUSTAINED`), instead of the traffic's own rate.
      duration_s: the length of the traffic.
      dense: whether to run on a profile of `DENSE` subnets and measure the time of each decision.
    """

    traffics: tuple[Traffic, ...]
    policies: tuple[str, ...]
    clusters: tuple[Cluster, ...] = (Cluster(workers=WORKERS),)
    scales: tuple[float, ...] = SCALES
    sustained: bool = False
    duration_s: float = DURATION_S
    dense: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """Some policies on the same arrivals. A cell runs in one process. For its fields see `Grid`."""

    preset: str
    traffic: Traffic
    cluster: Cluster
    scale: float
    seed: int
    policies: tuple[str, ...]
    sustained: bool = False
    duration_s: float = DURATION_S
    dense: bool = False

    @property
    def trace(self) -> str:
        """The name of the traffic, and what happens to the cluster."""
        cluster = self.cluster
        happens = [f"stall of {1e3 * (stall.until_s - stall.from_s):.0f} ms" for stall in cluster.stalls]
        if cluster.outages:
            happens.insert(0, f"{len(cluster.outages)} of {cluster.workers} workers killed")
        if cluster.actuation_ms:
            happens.insert(0, f"{cluster.actuation_ms:g} ms per change")
        if cluster.workers != WORKERS or self.sustained:
            happens.insert(0, f"{cluster.workers} worker{'s' * (cluster.workers > 1)}")
        return ", ".join([self.traffic.name, *happens])


def killed(every_s: float = 12.0) -> Cluster:
    """The paper's fault-tolerance experiment: every `every_s` seconds a worker is killed, until half of them are left."""
    return Cluster(workers=WORKERS, outages=tuple(Outage(i, every_s * (i + 1)) for i in range(WORKERS // 2)))


def _stalled(stall_ms: float) -> Cluster:
    return Cluster(workers=WORKERS, stalls=(Stall(2.0, 2.0 + 1e-3 * stall_ms),))


_OURS = ("slackfit", "slackfit-paper")
_AGAINST_FIXED = (*_OURS, "proteus", "fixed:all")
_ALL_POLICIES = (*_OURS, "slackfit-cumulative", "max-batch", "max-acc", "proteus", "least-accurate")
_FEW_LATENCY_BUCKETS = ("least-accurate", "slackfit-paper:8", "slackfit-paper:32", "slackfit-cumulative:32", "slackfit")
_SWEEP = tuple(f"{rule}:{n}" for rule in ("slackfit-paper", "slackfit-cumulative") for n in LATENCY_BUCKETS)
_STEADY = Traffic("steady", "gamma", (("cv2", 0.0),))
_STEADY_GROUPS = Traffic("steady, 8 at once", "gamma", (("cv2", 0.0),), group=8)
_SIZES = tuple(Cluster(workers=n) for n in (1, 2, 4, 8, 16, 32))
_ACTUATIONS_MS = (0.0, 0.2, 1.0, 3.0, 10.0, 30.0, 100.0, 200.0, 500.0)


def _switching(*delays_ms: float) -> tuple[Cluster, ...]:
    """Servers that need some time for each change of the subnet, as when they load a model."""
    return tuple(Cluster(workers=WORKERS, actuation_ms=ms) for ms in delays_ms)


PRESETS: Mapping[str, tuple[Grid, ...]] = {
    "maf": (Grid((MAF,), (*_OURS, "max-batch", "max-acc", "proteus", "fixed:all"), duration_s=120.0),),
    "bursty": (Grid(tuple(bursty(q, c) for q in (2950.0, 4900.0, 5550.0) for c in (2.0, 4.0, 8.0)), _AGAINST_FIXED),),
    "acceleration": (
        Grid(tuple(accelerating(q, a) for q in (4800.0, 6800.0, 7800.0) for a in (250.0, 500.0, 5000.0)), _AGAINST_FIXED),
    ),
    "policies": (Grid(tuple(bursty(5550.0, c) for c in (2.0, 4.0, 8.0)), _ALL_POLICIES),),
    "worker_kills": (
        Grid(
            (Traffic("gamma 3500 cv2=2", "gamma", (("rate_qps", 3500.0), ("cv2", 2.0))),),
            (*_OURS, "proteus", "least-accurate"),
            (killed(),),
        ),
    ),
    "dynamics": (Grid((bursty(5550.0, 2.0), HARDEST, accelerating(7800.0, 250.0), accelerating(7800.0, 5000.0)), _OURS),),
    "scale": (Grid((_STEADY,), (*_OURS, "least-accurate"), _SIZES, sustained=True, duration_s=10.0),),
    "scale_batches": (Grid((_STEADY_GROUPS,), (*_OURS, "least-accurate"), _SIZES, sustained=True, duration_s=10.0),),
    "actuation": (Grid((bursty(2950.0, 2.0),), (*_OURS, "proteus", "least-accurate"), _switching(*_ACTUATIONS_MS)),),
    "actuation_maf": (
        Grid((MAF,), (*_OURS, "proteus", "least-accurate"), _switching(0.0, 1.0, 10.0, 100.0), duration_s=120.0),
    ),
    "capacity": (
        Grid((_STEADY,), ("fixed:all",), sustained=True, duration_s=10.0),
        Grid(tuple(steady(load / 100) for load in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)), _OURS, duration_s=20.0),
    ),
    "slowdown": (
        Grid((bursty(2950.0, 2.0), bursty(4900.0, 4.0), bursty(5550.0, 4.0), HARDEST), _FEW_LATENCY_BUCKETS, scales=(1.9,)),
        Grid((HARDEST,), (*(n for n in _SWEEP if n not in _FEW_LATENCY_BUCKETS), "max-batch"), scales=(1.9,)),
        Grid((steady(0.8),), _FEW_LATENCY_BUCKETS, (_stalled(10.0), _stalled(200.0)), duration_s=6.0),
    ),
    "decisions": (Grid((HARDEST,), _ALL_POLICIES, duration_s=10.0, dense=True),),
}
"""The presets; `superserve compare --preset all` runs all of them.

The settings of some figures are not in our notes on the paper's text. These are from memory, unverified:
- "dynamics": that Figure 13 has two bursty and two accelerating traces. We use the ends of the ranges in the paper's text.
- "scale_batches": that clients send 8 queries at once.
- "actuation", "actuation_maf": the trace of Figure 1. One uses bursty traffic, the other one the sample of Azure Functions.
"""
AZURE = frozenset(n for n, grids in PRESETS.items() if any(t.process == "azure" for grid in grids for t in grid.traffics))
"""The presets that need a file of Azure Functions 2019."""


def recording(name: str, *, workers: int = WORKERS, **options: Any) -> Grid:
    """Recorded traffic, which is no preset: it comes from a user's file.

    Args:
      name: for tables and plots.
      workers: the number of workers.
      **options: arguments of `simulation.recorded.trace`.
    """
    return Grid((Traffic(name, "recorded", tuple(options.items())),), _AGAINST_FIXED, (Cluster(workers=workers),))


def cells(
    preset: str,
    grids: Sequence[Grid] = (),
    *,
    seeds: Sequence[int] = (0,),
    scales: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    duration_s: float | None = None,
    subnets: int = 6,
) -> Iterator[Cell]:
    """The cells of a preset, in the order of its tables. Traffic that is not random gets the first seed only.

    Args:
      preset: the preset's name.
      grids: what to run instead of a preset, under this name.
      seeds: the seeds of the traffic.
      scales: replaces the preset's scales.
      policies: replaces the preset's policies.
      duration_s: replaces the preset's lengths of traffic. Kills and stalls keep their places relative to this length.
      subnets: the number of subnets in the profile, for "fixed:all".

    Raises UnknownNameError for an unknown preset.

    >>> [cell.trace for cell in cells("slowdown")][-1]
    'steady, 80 % load, stall of 200 ms'
    """
    if not grids and preset not in PRESETS:
        raise errors.unknown_name("preset", preset, [*PRESETS, "all"])
    found: dict[Cell, None] = {}  # drops duplicates: with `policies`, grids may share cells
    for grid in grids or PRESETS[preset]:
        names = expand(policies or grid.policies, subnets=subnets)
        for traffic, scale, cluster in itertools.product(grid.traffics, scales or grid.scales, grid.clusters):
            for seed in seeds if traffic.random else seeds[:1]:
                length_s = duration_s or grid.duration_s
                moved = _moved(cluster, length_s / grid.duration_s)
                found[Cell(preset, traffic, moved, scale, seed, names, grid.sustained, length_s, grid.dense)] = None
    yield from found


def check_length(cell: Cell) -> None:
    """Raises ConfigError if accelerating traffic ends before its rate has stopped rising."""
    if cell.traffic.process == "accelerating":
        options = dict(cell.traffic.options)
        least_s = math.ceil(_RAMP_AT_S + (options["to_qps"] - _FROM_QPS) / options["qps_per_s"])
        if cell.duration_s < least_s:
            raise errors.ConfigError(
                f"preset '{cell.preset}': traffic '{cell.trace}' ends its rise after {least_s} s, so --seconds must be at "
                f"least {least_s}, got {cell.duration_s:g}"
            )


def _moved(cluster: Cluster, factor: float) -> Cluster:
    """A cluster whose kills and stalls come `factor` times as late. A stall keeps its length."""
    outages = tuple(Outage(o.worker, factor * o.from_s, factor * o.until_s) for o in cluster.outages)
    stalls = tuple(Stall(factor * s.from_s, factor * s.from_s + (s.until_s - s.from_s)) for s in cluster.stalls)
    return dataclasses.replace(cluster, outages=outages, stalls=stalls)


def dense(profile: Profile, subnets: int = DENSE) -> Profile:
    """A profile with many subnets, interpolated linearly between the rows of `profile` at its longest length.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> len(dense(paper_profile()).rows)
    500
    """
    places = np.linspace(0, len(profile.rows) - 1, subnets).tolist()
    table = np.array([(row.accuracy, *row.latency_ms) for row in profile.rows])
    columns = [np.interp(places, np.arange(len(table)), column).tolist() for column in table.T]
    subnet = profile.rows[0].subnet
    rows = tuple(
        Row(dataclasses.replace(subnet, axes=(("between", (place,)),)), accuracy, tuple(latency_ms))
        for place, accuracy, *latency_ms in zip(places, *columns, strict=True)
    )
    return Profile(profile.batch_sizes, rows, profile.device)
