"""Cells side by side: several servers, each with its own queue and workers, and a balancer that splits the traffic. No jax.

With random routing the cells know nothing of each other. So each cell is a simulation of its own, over its share of the trace.
With two choices, the balancer looks at the cells every `refresh_ms`, and counts what it has sent to them since. The cells run
in lock-step, from look to look.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies import Policy
from superserve_jax.simulation import metrics, simulator, traces
from superserve_jax.simulation.cluster import Cluster, Outage
from superserve_jax.simulation.simulator import Simulation, SimulationResult
from superserve_jax.simulation.traces import Trace


class LostCell(NamedTuple):
    """A cell is lost for good at `from_s`: its router, its workers, and the queries that it has.

    The balancer learns of it `noticed_s` seconds later. The queries that it sends there until then are lost, too.
    """

    cell: int
    from_s: float
    noticed_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cells:
    """Several cells and their balancer.

    Args:
      clusters: the workers, options and failures of each cell. Each cell gets the same share of the traffic.
      routing: "random" sends a query to any cell. "two-choices" draws two cells, and takes the one with fewer unanswered
        queries.
      refresh_ms: how long the balancer does not know of answers. It counts the queries that it sends at once.
      lost: the cells that are lost, each at most once.

    >>> Cells((Cluster(workers=8),) * 4).clusters[3].workers
    8
    """

    clusters: tuple[Cluster, ...]
    routing: Literal["random", "two-choices"] = "random"
    refresh_ms: float = 1.0
    lost: tuple[LostCell, ...] = ()

    def __post_init__(self):
        errors.check_name("routing", self.routing, ("random", "two-choices"))
        traces.check(refresh_ms=self.refresh_ms)
        cells = range(len(self.clusters))
        gone = {lost.cell for lost in self.lost}
        if odd := [lost for lost in self.lost if lost.cell not in cells or not (lost.from_s >= 0 and lost.noticed_s >= 0)]:
            raise errors.ConfigError(
                f"{odd[0]} is impossible: expected one of {len(cells)} cells, counted from 0, and times from 0"
            )
        if len(gone) < len(self.lost) or len(gone) >= len(cells):
            raise errors.ConfigError(
                f"{len(self.lost)} of {len(cells)} cells are lost; one cell must be left, and each is lost at most once"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class CellsResult:
    """What happened to each query, and in which cell.

    Args:
      queries: what happened. The workers of the second cell are numbered after those of the first one, and so on.
      cell: [queries] number of the cell that each query was sent to.
    """

    queries: SimulationResult
    cell: np.ndarray

    @property
    def attainment(self) -> float:
        """See `metrics.attainment`."""
        return self.queries.attainment

    @property
    def mean_accuracy(self) -> float:
        """See `metrics.mean_accuracy`."""
        return self.queries.mean_accuracy

    def attainment_of_cells(self) -> list[float]:
        """See `metrics.attainment`, for each cell from 0 to the last one that got a query."""
        each = (self.cell == cell for cell in range(int(self.cell.max(initial=-1)) + 1))
        return [metrics.attainment(self.queries.deadline_s[here], self.queries.finish_s[here]) for here in each]


def simulate_cells(profile: Profile, policy: str | Policy, trace: Trace, cells: Cells, *, seed: int = 0) -> CellsResult:
    """Simulate several cells that share the queries of a trace. See `simulator.simulate`.

    Args:
      profile: the profile of all workers.
      policy: a policy for all cells, or its name.
      trace: the traffic of all cells together.
      cells: the cells.
      seed: seed of the routing and of the latency noise.

    >>> from superserve_jax.simulation.paper_profile import paper_profile
    >>> trace = traces.gamma(rate_qps=40_000.0, duration_s=0.2)
    >>> for count, workers in (1, 32), (4, 8):
    ...     result = simulate_cells(paper_profile(), "slackfit", trace, Cells((Cluster(workers),) * count))
    ...     print(result.attainment, round(result.mean_accuracy, 3))
    1.0 0.772
    1.0 0.772
    """
    rng = traces.generator(seed)
    lost = {
        one.cell: tuple(Outage(worker, one.from_s) for worker in range(cells.clusters[one.cell].workers)) for one in cells.lost
    }
    clusters = [
        dataclasses.replace(cluster, outages=cluster.outages + lost.get(cell, ()))
        for cell, cluster in enumerate(cells.clusters)
    ]
    if cells.routing == "random":
        cell = _random_cells(cells, trace.arrivals_s, rng)
        results = (
            simulator.simulate(profile, policy, trace.some(np.flatnonzero(cell == c)), cluster=cluster, seed=seed + c)
            for c, cluster in enumerate(clusters)
        )
        return _merged(trace, cells, cell, results)
    with simulator.watched(policy) as decide:
        runs = [Simulation(profile, policy, cluster, seed=seed + c, decide=decide) for c, cluster in enumerate(clusters)]
        cell = _lock_step(cells, runs, trace, rng)
    return _merged(trace, cells, cell, (run.result(trace.some(np.flatnonzero(cell == c))) for c, run in enumerate(runs)))


def _known(cells: Cells) -> list[tuple[float, np.ndarray]]:
    """(time, cells that the balancer believes to be there from this time on), in ascending order of the times."""
    noticed = {lost.cell: lost.from_s + lost.noticed_s for lost in cells.lost}
    times = sorted({0.0, *noticed.values()})
    return [(t, np.array([c for c in range(len(cells.clusters)) if noticed.get(c, math.inf) > t])) for t in times]


def _random_cells(cells: Cells, arrivals_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random cell for each query."""
    known = _known(cells)
    edges = np.searchsorted(arrivals_s, [t for t, _ in known[1:]])
    sizes = np.diff([0, *edges, len(arrivals_s)])
    return np.concatenate([rng.choice(there, size) for (_, there), size in zip(known, sizes, strict=True)])


def _lock_step(cells: Cells, runs: list[Simulation], trace: Trace, rng: np.random.Generator) -> np.ndarray:
    """The cell of each query by two choices. Afterwards all runs have ended."""
    columns, known = simulator.columns(trace), _known(cells)
    chosen = np.zeros(len(trace), np.int64)
    for first, end, until_s in _looks(trace.arrivals_s, 1e-3 * cells.refresh_ms):
        while len(known) > 1 and known[1][0] <= trace.arrivals_s[first]:
            known.pop(0)
        there = known[0][1]
        load = [run.unanswered for run in runs]
        one = rng.integers(len(there), size=end - first)
        other = (one + rng.integers(1, max(len(there), 2), size=end - first)) % len(there)
        for i, a, b in zip(range(first, end), there[one].tolist(), there[other].tolist(), strict=True):
            chosen[i] = c = a if load[a] <= load[b] else b
            load[c] += 1
        for c, run in enumerate(runs):
            mine = first + np.flatnonzero(chosen[first:end] == c)
            if len(mine):
                run.extend(*(column[mine] for column in columns))
            run.run(until_s)
    for run in runs:
        run.run()
    return chosen


def _looks(arrivals_s: np.ndarray, step_s: float) -> Iterator[tuple[int, int, float]]:
    """(first query, end, time of the next look) of each step in which queries arrive."""
    steps = np.floor(arrivals_s / step_s).astype(np.int64)
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    for first, end in itertools.pairwise(edges):
        if first < end:
            yield first, end, max(float(steps[first] + 1) * step_s, float(np.nextafter(arrivals_s[end - 1], math.inf)))


def _merged(trace: Trace, cells: Cells, cell: np.ndarray, results: Iterator[SimulationResult]) -> CellsResult:
    """One result of all cells. It takes the results one by one, so that only one of them is in memory."""
    names = [f.name for f in dataclasses.fields(SimulationResult)]
    merged: dict[str, np.ndarray] = {}
    workers = 0
    for c, (cluster, result) in enumerate(zip(cells.clusters, results, strict=True)):
        here = np.flatnonzero(cell == c)
        for name in names:
            values = getattr(result, name)
            merged.setdefault(name, np.zeros(len(trace), values.dtype))[here] = values
        merged["worker"][here] = np.where(result.worker < 0, -1, result.worker + workers)
        workers += cluster.workers
    return CellsResult(SimulationResult(**merged), cell)
