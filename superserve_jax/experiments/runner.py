"""Runs the cells of `experiments` in the simulator: one row of plain values per cell and policy. No jax.

A row, as `serve/compare.py --json` writes it, has `preset`, `trace`, `scale`, `policy` and `seed`, which name it, and
- `attainment`: SLO attainment, a FRACTION from 0 to 1; `accuracy`: mean serving accuracy in PERCENT, as in the paper's tables,
  None where no query met its deadline;
- `fluid_attainment`, `fluid_accuracy`: the same of the fluid bound (see `bounds`);
- `workers`, `actuation_ms`: of the cluster; `queries`, `rate_qps`: of the traffic; `p99_ms`: latency of the answered queries;
- `accuracy_first`, `accuracy_last`: accuracy over the first and the last fifth of the queries;
- `last_miss_s`: where the server stalls, from the end of the stall to the last missed answer, 0 if none was missed, else None;
- `decision_p50_us`, `decision_p99_us`: time of one decision, None where it was not taken.
All but the last two are determined by cell, profile and policy.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors, progress
from superserve_jax.experiments import presets
from superserve_jax.experiments.presets import Cell
from superserve_jax.profile import Profile
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision, Policy, State
from superserve_jax.simulation import bounds, metrics, simulator
from superserve_jax.simulation.bounds import Bound
from superserve_jax.simulation.metrics import Series
from superserve_jax.simulation.simulator import Cluster, SimulationResult, Stall
from superserve_jax.simulation.traces import Trace

SUSTAINED = 0.999
"""Attainment at which a rate counts as sustained (the paper's Figure 5c and its scalability experiment)."""
_BISECTIONS = 9

CellResult = dict[str, Any]


def evaluate(cells: Sequence[Cell], profile: Profile, *, jobs: int = 1, maf_trace: str | None = None) -> list[CellResult]:
    """The rows of all cells, in their order, whatever `jobs`; shows its progress.

    Args:
      profile: at scale 1.
      jobs: processes; 1 stays in this one. With more, the calling program needs the usual `if __name__ == "__main__"`, since
        processes are spawned.
      maf_trace: see `experiments.Traffic.create`.

    Raises what the policies, traces and profiles do.
    """
    if jobs < 1:
        raise errors.ConfigError(f"jobs must be 1 or more, got {jobs}")
    run = functools.partial(run_cell, profile=profile, maf_trace=maf_trace)
    # Decisions are timed afterwards, when nothing else runs.
    order = sorted(range(len(cells)), key=lambda i: cells[i].dense)
    together = [cells[i] for i in order if not cells[i].dense]
    alone = [cells[i] for i in order if cells[i].dense]
    rows: list[list[CellResult]] = [[] for _ in cells]
    with _mapped(run, together, jobs) as done:
        for i, result in zip(
            order, progress.track(itertools.chain(done, map(run, alone)), "simulating", total=len(cells)), strict=True
        ):
            rows[i] = result
    return list(itertools.chain.from_iterable(rows))


@contextlib.contextmanager
def _mapped(run: Callable[[Any], list[CellResult]], items: Sequence[Any], jobs: int) -> Iterator[Iterable[list[CellResult]]]:
    """`map` over processes; leaving it early cancels what has not begun."""
    if jobs == 1 or len(items) < 2:
        yield map(run, items)
        return
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(items)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool.map(run, items)
    finally:
        pool.shutdown(cancel_futures=True)


def run_cell(cell: Cell, profile: Profile, maf_trace: str | None = None) -> list[CellResult]:
    """One row per policy of the cell."""
    profile = scaled(cell, profile)
    if cell.sustained:
        rows = []
        for name in cell.policies:
            trace, result, timed = _sustained(cell, name, profile)
            rows.append(_row(cell, name, trace, _fluid(profile, trace, cell.cluster), result, timed))
        return rows
    trace = make_trace(cell, profile, maf_trace)
    bound = _fluid(profile, trace, cell.cluster)
    return [_row(cell, name, trace, bound, *_served(cell, name, profile, trace)) for name in cell.policies]


def scaled(cell: Cell, profile: Profile) -> Profile:
    """The profile that a cell's policies and devices have."""
    return (presets.dense(profile) if cell.dense else profile).scaled(cell.scale)


def make_trace(cell: Cell, profile: Profile, maf_trace: str | None = None) -> Trace:
    """A cell's arrivals; `profile` is the scaled one."""
    capacity_qps = cell.cluster.workers * profile.throughput_qps(profile.rows[0].subnet)
    return cell.traffic.create(cell.seed, capacity_qps=capacity_qps, duration_s=cell.duration_s, maf_trace=maf_trace)


def timeline(cell: Cell, policy: str, profile: Profile, *, maf_trace: str | None = None, window_s: float = 0.25) -> Series:
    """A cell's run over time, for a plot; `profile` is the one at scale 1."""
    profile = scaled(cell, profile)
    result, _ = _served(cell, policy, profile, make_trace(cell, profile, maf_trace))
    return metrics.series(
        result.arrival_s, result.deadline_s, result.finish_s, result.accuracy, result.batch, window_s=window_s
    )


def _served(cell: Cell, name: str, profile: Profile, trace: Trace) -> tuple[SimulationResult, "_Timed | None"]:
    policy = policies.create(name, profile)
    timed = _Timed(policy) if cell.dense else None
    result = simulator.simulate(profile, timed or policy, trace, cluster=cell.cluster, seed=cell.seed)
    return result, timed


def _sustained(cell: Cell, name: str, profile: Profile) -> tuple[Trace, SimulationResult, "_Timed | None"]:
    """The run at the highest rate that attains `SUSTAINED`: bisection up to 1.25 times what the fastest subnet carries."""
    low, high, best = 0.0, 1.25, None
    for _ in range(_BISECTIONS):
        load = (low + high) / 2
        at_load = dataclasses.replace(cell, traffic=dataclasses.replace(cell.traffic, load=load))
        trace = make_trace(at_load, profile)
        result, timed = _served(at_load, name, profile, trace)
        if result.attainment >= SUSTAINED:
            low, best = load, (trace, result, timed)
        else:
            high = load
    return best or (trace, result, timed)  # where nothing is sustained, the lowest rate tried


def _row(
    cell: Cell,
    name: str,
    trace: Trace,
    bound: Bound,
    result: SimulationResult,
    timed: "_Timed | None",
) -> CellResult:
    answered = np.isfinite(result.finish_s)
    fifth = max(len(trace) // 5, 1)
    decision_us = timed.percentiles_us() if timed else (None, None)
    return {
        "preset": cell.preset,
        "trace": cell.trace,
        "scale": cell.scale,
        "policy": name,
        "seed": cell.seed,
        "attainment": result.attainment,
        "accuracy": _percent(result.mean_accuracy),
        "fluid_attainment": bound.attainment,
        "fluid_accuracy": _percent(bound.accuracy),
        "workers": cell.cluster.workers,
        "actuation_ms": cell.cluster.actuation_ms,
        "queries": len(trace),
        "rate_qps": trace.mean_qps,
        "p99_ms": float(1e3 * np.percentile((result.finish_s - result.arrival_s)[answered], 99)) if answered.any() else None,
        "accuracy_first": _percent(_accuracy(result, slice(fifth))),
        "accuracy_last": _percent(_accuracy(result, slice(-fifth, None))),
        "last_miss_s": _last_miss_s(result, cell.cluster.stalls),
        "decision_p50_us": decision_us[0],
        "decision_p99_us": decision_us[1],
    }


def _fluid(profile: Profile, trace: Trace, cluster: Cluster) -> Bound:
    """The fluid bound; where workers leave or return, that of each time between, weighted by its queries."""
    edges = sorted({t for o in cluster.outages for t in (o.from_s, o.until_s) if t < math.inf})
    parts = np.split(trace.arrivals_s, np.searchsorted(trace.arrivals_s, edges))
    met = correct = 0.0
    for start_s, arrivals in zip([0.0, *edges], parts, strict=True):
        alive = cluster.workers - len({o.worker for o in cluster.outages if o.from_s <= start_s < o.until_s})
        if len(arrivals) and alive:
            piece = Trace(arrivals - start_s, trace.slo_ms, trace.floors) if edges else trace
            bound = bounds.fluid_of_trace(profile, piece, workers=alive)
            met += bound.attainment * len(arrivals)
            correct += bound.attainment * len(arrivals) * bound.accuracy
    return Bound(met / max(len(trace), 1), correct / met if met else math.nan)


def _accuracy(result: SimulationResult, which: slice) -> float:
    met = result.accuracy[which][result.outcome[which] == simulator.MET]
    return float(met.mean()) if len(met) else math.nan


def _last_miss_s(result: SimulationResult, stalls: Iterable[Stall]) -> float | None:
    if not stalls:
        return None
    missed = result.outcome != simulator.MET
    times = np.where(np.isfinite(result.finish_s), result.finish_s, result.deadline_s)[missed]
    return max(float(times.max(initial=0.0)) - max(s.until_s for s in stalls), 0.0)


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * fraction


class _Timed:
    """A policy, and the time that each of its decisions took."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._ns: list[int] = []

    def __call__(self, profile: Profile, state: State) -> Decision:
        start = time.perf_counter_ns()
        decision = self._policy(profile, state)
        self._ns.append(time.perf_counter_ns() - start)
        return decision

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)  # what a planner has besides

    def percentiles_us(self) -> tuple[float, float]:
        p50, p99 = np.percentile(self._ns, [50, 99]) / 1e3
        return float(p50), float(p99)
