"""The evaluation as data: which traffic, policies and clusters make up each preset of `serve/compare.py`. No jax.

The settings are those of the paper's Section 6 (Figures 1, 5c, 8 to 11 and 13); what it leaves open is said where it is set.
A *scale* s makes the profile's device s times slower. With the reconstructed profile (`reference`) eight workers at 1.9 carry
the 2,000 to 9,000 queries/s that the paper's Figure 5c shows, so traffic weighs there as it does in the paper; at 1.0, the
latencies of its Figure 6, they carry twice as many.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.simulation import azure, traces
from superserve_jax.simulation.simulator import Cluster, Outage, Stall
from superserve_jax.simulation.traces import Trace

SLO_MS = 36.0
DURATION_S = 60.0
WORKERS = 8
SCALES = (1.0, 1.9)
DENSE = 500  # subnets in the profile on which decisions are timed
_PROCESSES = {"bursty": traces.bursty, "accelerating": traces.accelerating, "gamma": traces.gamma, "azure": azure.trace}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A trace, not yet made.

    Args:
      name: for tables and plots.
      process: "bursty", "accelerating" or "gamma" (see `traces`), or "azure" (see `azure.trace`).
      options: arguments of that function, by name.
      load: of "gamma", instead of its rate: the share of what all workers carry with the fastest subnet.
    """

    name: str
    process: str
    options: tuple[tuple[str, float], ...] = ()
    load: float | None = None

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return dict(self.options).get("cv2", 1.0) != 0

    def create(
        self, seed: int, *, capacity_qps: float = 0.0, duration_s: float = DURATION_S, maf_trace: str | None = None
    ) -> Trace:
        """The trace.

        Args:
          capacity_qps: what `load` is a share of.
          duration_s: its length.
          maf_trace: CSV file of Azure Functions 2019, which "azure" reads.

        Raises DataError where "azure" has no file.
        """
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
            options["paths"] = maf_trace
        return dataclasses.replace(_PROCESSES[self.process](**options), name=self.name)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every policy on every traffic, with every cluster, at every scale.

    Args:
      policies: names of `policies.create`; "fixed:all" stands for every subnet of the profile, fixed.
      sustained: do not serve the traffic as it is, but seek the highest rate at which it attains `evaluation.SUSTAINED`.
      duration_s: of the traffic.
      dense: on a profile of `DENSE` subnets, with the time of each decision taken.
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
    """What is run at once, in one process: some policies on the same arrivals."""

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
        """Name of the traffic and of what happens to the cluster meanwhile."""
        return ", ".join([self.traffic.name, *_happens(self)])


def dense(profile: Profile, subnets: int = DENSE) -> Profile:
    """A profile with many subnets, evenly spaced along the straight lines between the rows of `profile` (its longest length).

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> len(dense(paper_profile()).rows)
    500
    """
    rows, n = profile.rows, len(profile.rows)
    made = []
    for i in range(subnets):
        place = i * (n - 1) / max(subnets - 1, 1)
        low = min(int(place), max(n - 2, 0))
        a, b, t = rows[low], rows[min(low + 1, n - 1)], place - low
        latency_ms = tuple(x + t * (y - x) for x, y in zip(a.latency_ms, b.latency_ms, strict=True))
        made.append(
            Row(
                dataclasses.replace(a.subnet, axes=(("between", (place,)),)),
                a.accuracy + t * (b.accuracy - a.accuracy),
                latency_ms,
            )
        )
    return Profile(profile.batch_sizes, tuple(made), profile.device)


def bursty(burst_qps: float, cv2: float) -> Traffic:
    """The paper's bursty traffic of 1500 queries/s plus a gamma process."""
    return Traffic(f"1500+{burst_qps:g} cv2={cv2:g}", "bursty", (("burst_qps", burst_qps), ("cv2", cv2)))


def accelerating(to_qps: float, qps_per_s: float) -> Traffic:
    """The paper's traffic that rises from 2500 queries/s. It does not say when: 10 s after the start."""
    return Traffic(f"2500-{to_qps:g} at {qps_per_s:g}", "accelerating", (("to_qps", to_qps), ("qps_per_s", qps_per_s)))


def steady(load: float) -> Traffic:
    """Evenly spaced arrivals, at a share of what the fastest subnet carries."""
    return Traffic(f"steady, {100 * load:g} % load", "gamma", (("cv2", 0.0),), load)


MAF = Traffic("MAF 6400", "azure", (("mean_qps", 6400.0),))
"""A day shrunk to a minute or two, at a mean of 6400 queries/s."""
HARDEST = bursty(5550.0, 8.0)
BUCKETS = (4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 48, 64)

_OURS = ("slackfit", "slackfit-paper")
_AGAINST_FIXED = (*_OURS, "proteus", "fixed:all")


def killed(every_s: float = 12.0, survivors: int = WORKERS // 2) -> Cluster:
    """The paper's fault experiment: a worker is killed again and again, until half of them are left."""
    outages = tuple(Outage(i, every_s * (i + 1)) for i in range(WORKERS - survivors))
    return Cluster(workers=WORKERS, outages=outages)


def _stalled(stall_ms: float) -> Cluster:
    return Cluster(workers=WORKERS, stalls=(Stall(2.0, 2.0 + 1e-3 * stall_ms),))


PRESETS: Mapping[str, tuple[Grid, ...]] = {
    "maf": (Grid((MAF,), (*_OURS, "max-batch", "max-acc", "proteus", "fixed:all"), duration_s=120.0),),
    "bursty": (
        Grid(
            tuple(bursty(qps, c) for qps, c in itertools.product((2950.0, 4900.0, 5550.0), (2.0, 4.0, 8.0))),
            _AGAINST_FIXED,
        ),
    ),
    "acceleration": (
        Grid(
            tuple(accelerating(qps, a) for qps, a in itertools.product((4800.0, 6800.0, 7800.0), (250.0, 500.0, 5000.0))),
            _AGAINST_FIXED,
        ),
    ),
    "policies": (
        Grid(
            tuple(bursty(5550.0, c) for c in (2.0, 4.0, 8.0)),
            (*_OURS, "slackfit-cumulative", "max-batch", "max-acc", "proteus", "least-accurate"),
        ),
    ),
    "faults": (
        Grid(
            (Traffic("gamma 3500 cv2=2", "gamma", (("rate_qps", 3500.0), ("cv2", 2.0))),),
            (*_OURS, "proteus", "least-accurate"),
            (killed(),),
        ),
    ),
    "scale": (
        Grid(
            (Traffic("steady", "gamma", (("cv2", 0.0),)),),
            (*_OURS, "least-accurate"),
            tuple(Cluster(workers=n) for n in (1, 2, 4, 8, 16, 32)),
            sustained=True,
            duration_s=10.0,
        ),
    ),
    "actuation": (
        Grid(
            (bursty(2950.0, 2.0),),
            (*_OURS, "proteus", "least-accurate"),
            tuple(Cluster(workers=WORKERS, actuation_ms=ms) for ms in (0.0, 0.2, 1.0, 3.0, 10.0, 30.0, 100.0, 200.0, 500.0)),
        ),
    ),
    "capacity": (
        Grid((Traffic("steady", "gamma", (("cv2", 0.0),)),), ("fixed:all",), sustained=True, duration_s=10.0),
        Grid(tuple(steady(load / 100) for load in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)), _OURS, duration_s=20.0),
    ),
    "slowdown": (
        Grid(
            (bursty(2950.0, 2.0), bursty(4900.0, 4.0), bursty(5550.0, 4.0), HARDEST),
            ("least-accurate", "slackfit-paper:8", "slackfit-paper:32", "slackfit-cumulative:32", "slackfit"),
            scales=(1.9,),
        ),
        Grid(
            (HARDEST,),
            (
                *(f"slackfit-paper:{n}" for n in BUCKETS if n not in (8, 32)),
                *(f"slackfit-cumulative:{n}" for n in BUCKETS if n != 32),
                "max-batch",
            ),
            scales=(1.9,),
        ),
        Grid(
            (steady(0.8),),
            ("least-accurate", "slackfit-paper:8", "slackfit-paper:32", "slackfit-cumulative:32", "slackfit"),
            (_stalled(10.0), _stalled(200.0)),
            duration_s=6.0,
        ),
    ),
    "decisions": (
        Grid(
            (HARDEST,),
            (*_OURS, "slackfit-cumulative", "max-batch", "max-acc", "proteus", "least-accurate"),
            duration_s=10.0,
            dense=True,
        ),
    ),
}
"""The presets; `serve/compare.py --preset all` runs every one of them."""


def cells(
    preset: str,
    *,
    seeds: Sequence[int] = (0,),
    scales: Sequence[float] | None = None,
    policies: Sequence[str] | None = None,
    duration_s: float | None = None,
    subnets: int = 6,
) -> Iterator[Cell]:
    """What a preset consists of, in the order of its tables. Traffic without chance in it is run with the first seed only.

    Args:
      seeds, scales, policies, duration_s: instead of the preset's.
      subnets: number in the profile, which "fixed:all" stands for.

    Raises UnknownNameError for a preset that is not known.

    >>> [cell.trace for cell in cells("slowdown")][-1]
    'steady, 80 % load, stall of 200 ms'
    """
    if preset not in PRESETS:
        raise errors.unknown_name("preset", preset, [*PRESETS, "all"])
    seen: set[Cell] = set()
    for grid in PRESETS[preset]:
        names: list[str] = []
        for name in policies or grid.policies:
            names += [f"fixed:{i}" for i in range(subnets)] if name == "fixed:all" else [name]
        for traffic, scale, cluster in itertools.product(grid.traffics, scales or grid.scales, grid.clusters):
            for seed in seeds if traffic.random else seeds[:1]:
                length_s = duration_s or grid.duration_s
                cell = Cell(preset, traffic, cluster, scale, seed, tuple(names), grid.sustained, length_s, grid.dense)
                if cell not in seen:  # as two grids with the same traffic are, once `policies` replaces theirs
                    seen.add(cell)
                    yield cell


def _happens(cell: Cell) -> Iterator[str]:
    cluster = cell.cluster
    if cluster.workers != WORKERS or cell.sustained:
        yield f"{cluster.workers} worker{'s' * (cluster.workers > 1)}"
    if cluster.actuation_ms:
        yield f"{cluster.actuation_ms:g} ms per change"
    if cluster.outages:
        yield f"{len(cluster.outages)} of {cluster.workers} workers killed"
    for stall in cluster.stalls:
        yield f"stall of {1e3 * (stall.until_s - stall.from_s):.0f} ms"
