"""Runs the cells of `presets` in the simulator. Each cell and policy gives one result, a dict of plain values. No jax.

`superserve compare --json FILE` writes the results. They have these keys:
- `preset`, `trace`, `scale`, `policy` and `seed` name the run. For `policy`, see `policies.labels`.
- `attainment` is the SLO attainment, a FRACTION from 0 to 1.
- `accuracy` is the mean serving accuracy in PERCENT, as in the paper's tables; None if no query met its deadline.
- `fluid_attainment` and `fluid_accuracy` are the same two values of the fluid bound, see `simulation.bounds`.
- `workers` and `actuation_ms` describe the cluster, `queries` and `rate_qps` the traffic.
- `p99_ms` is the 99th percentile of the latency of the answered queries.
- `accuracy_first` and `accuracy_last` are the accuracy over the first and the last fifth of the queries.
- `last_miss_s` is the time from the end of a stall to the last missed query. It is 0 if none was missed after the stall, and
  None without a stall.
- `decision_p50_us` and `decision_p99_us` are percentiles of the time of a decision; None if it was not measured.
Cell, profile and policy determine every value except the times of decisions.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from superserve_jax import errors, progress
from superserve_jax.experiments import presets
from superserve_jax.experiments.presets import Cell
from superserve_jax.profile import Profile
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision, State
from superserve_jax.simulation import bounds, metrics, simulator
from superserve_jax.simulation.bounds import Bound
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.metrics import Series
from superserve_jax.simulation.simulator import SimulationResult
from superserve_jax.simulation.traces import Trace

SUSTAINED = 0.999
"""A rate is sustained if its attainment is at least this (the paper's Figure 5c and its scalability experiment)."""
_BISECTIONS = 9

CellResult = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Run:
    """One policy on one trace. `decisions_ns` holds the time of each decision, if the cell asks for it."""

    trace: Trace
    result: SimulationResult
    decisions_ns: list[int]


def evaluate(cells: Sequence[Cell], profile: Profile, *, jobs: int = 1, maf_trace: str | None = None) -> list[CellResult]:
    """The results of all cells, in their order. Shows its progress.

    Args:
      cells: what to run.
      profile: the profile at scale 1.
      jobs: the number of processes; 1 runs everything in the calling process. With more, the calling program needs
        `if __name__ == "__main__"`, because the processes are spawned.
      maf_trace: see `presets.Traffic.create`.

    Raises the errors of the policies, traces and profiles.
    """
    if jobs < 1:
        raise errors.ConfigError(f"jobs must be 1 or more, got {jobs}")
    run = functools.partial(run_cell, profile=profile, maf_trace=maf_trace)
    # Dense cells time their decisions, so they run last, when no other process is busy.
    order = sorted(range(len(cells)), key=lambda i: cells[i].dense)
    together, alone = ([cells[i] for i in order if cells[i].dense == dense] for dense in (False, True))
    with contextlib.closing(_mapped(run, together, jobs)) as parallel:
        everything = itertools.chain(parallel, map(run, alone))
        results = dict(
            zip(order, progress.track(everything, "simulating all policies, trace by trace", total=len(cells)), strict=True)
        )
    return [result for i in range(len(cells)) for result in results[i]]


def _mapped(run: Callable[[Cell], list[CellResult]], cells: Sequence[Cell], jobs: int) -> Generator[list[CellResult]]:
    """`map` in several processes. Closing it early cancels the cells that have not begun."""
    if jobs == 1 or len(cells) < 2:
        yield from map(run, cells)
        return
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(cells)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(run, cells)
    finally:
        pool.shutdown(cancel_futures=True)


def run_cell(cell: Cell, profile: Profile, maf_trace: str | None = None) -> list[CellResult]:
    """Runs a cell. Returns one result per policy. `profile` is the profile at scale 1."""
    profile = _scaled(cell, profile)
    if cell.sustained:
        runs = [_sustained(cell, name, profile) for name in cell.policies]
        limits = [_fluid(profile, run.trace, cell.cluster) for run in runs]
    else:
        trace = make_trace(cell, profile, maf_trace)
        runs = [_simulate(cell, name, profile, trace) for name in cell.policies]
        limits = [_fluid(profile, trace, cell.cluster)] * len(runs)
    labels = policies.labels(cell.policies)
    names = [labels[name] for name in cell.policies]
    return [_result(cell, *each) for each in zip(names, runs, limits, strict=True)]


def make_trace(cell: Cell, profile: Profile, maf_trace: str | None = None) -> Trace:
    """A cell's arrivals. `profile` is the profile at the cell's scale."""
    capacity_qps = cell.cluster.workers * profile.throughput_qps(profile.rows[0].subnet)
    return cell.traffic.create(cell.seed, capacity_qps=capacity_qps, duration_s=cell.duration_s, maf_trace=maf_trace)


def timeline(cell: Cell, policy: str, profile: Profile, *, maf_trace: str | None = None, window_s: float = 0.25) -> Series:
    """A cell's run over time, for a plot. `profile` is the profile at scale 1."""
    profile = _scaled(cell, profile)
    r = _simulate(cell, policy, profile, make_trace(cell, profile, maf_trace)).result
    return metrics.series(r.arrival_s, r.deadline_s, r.finish_s, r.accuracy, r.batch, window_s=window_s)


def _scaled(cell: Cell, profile: Profile) -> Profile:
    return (presets.dense(profile) if cell.dense else profile).scaled(cell.scale)


def _simulate(cell: Cell, name: str, profile: Profile, trace: Trace) -> _Run:
    policy, decisions_ns = policies.create(name, profile), []

    def timed(profile: Profile, state: State) -> Decision:
        start_ns = time.perf_counter_ns()
        decision = policy(profile, state)
        decisions_ns.append(time.perf_counter_ns() - start_ns)
        return decision

    result = simulator.simulate(profile, timed if cell.dense else policy, trace, cluster=cell.cluster, seed=cell.seed)
    return _Run(trace, result, decisions_ns)


def _sustained(cell: Cell, name: str, profile: Profile) -> _Run:
    """The run at the highest sustained rate, by bisection up to 1.25 times what the workers can serve with the fastest subnet.

    If no rate is sustained, it is the run at the lowest rate that was tried.
    """
    low, high, best = 0.0, 1.25, None
    for _ in range(_BISECTIONS):
        load = (low + high) / 2
        at_load = dataclasses.replace(cell, traffic=dataclasses.replace(cell.traffic, load=load))
        run = _simulate(at_load, name, profile, make_trace(at_load, profile))
        if run.result.attainment >= SUSTAINED:
            low, best = load, run
        else:
            high = load
    return best or run


def _result(cell: Cell, policy: str, run: _Run, bound: Bound) -> CellResult:
    result, trace = run.result, run.trace
    figures = metrics.summary(result.arrival_s, result.deadline_s, result.finish_s, result.accuracy)
    fifth = max(len(trace) // 5, 1)
    decision_us = np.percentile(run.decisions_ns, [50, 99]) / 1e3 if run.decisions_ns else (math.nan, math.nan)
    values = {
        "attainment": figures.attainment,
        "accuracy": 100 * figures.accuracy,
        "fluid_attainment": bound.attainment,
        "fluid_accuracy": 100 * bound.accuracy,
        "workers": cell.cluster.workers,
        "actuation_ms": cell.cluster.actuation_ms,
        "queries": len(trace),
        "rate_qps": trace.mean_qps,
        "p99_ms": figures.p99_ms,
        "accuracy_first": _accuracy(result, slice(fifth)),
        "accuracy_last": _accuracy(result, slice(-fifth, None)),
        "last_miss_s": _last_miss_s(result, cell.cluster),
        "decision_p50_us": float(decision_us[0]),
        "decision_p99_us": float(decision_us[1]),
    }
    names = {"preset": cell.preset, "trace": cell.trace, "scale": cell.scale, "policy": policy, "seed": cell.seed}
    return names | {key: None if math.isnan(value) else value for key, value in values.items()}


def _fluid(profile: Profile, trace: Trace, cluster: Cluster) -> Bound:
    """The fluid bound. If workers leave or return, each span between these events has its own bound.

    The result is the mean of these bounds, weighted by the queries of each span.
    """
    edges = sorted({t for o in cluster.outages for t in (o.from_s, o.until_s) if t < math.inf})
    parts = np.split(trace.arrivals_s, np.searchsorted(trace.arrivals_s, edges))
    met = correct = 0.0
    for start_s, arrivals in zip([0.0, *edges], parts, strict=True):
        alive = cluster.workers - len({o.worker for o in cluster.outages if o.from_s <= start_s < o.until_s})
        if len(arrivals) and alive:
            piece = Trace(arrivals - start_s, trace.slo_ms, trace.floors) if edges else trace
            bound = bounds.fluid(profile, piece, workers=alive)
            met += bound.attainment * len(arrivals)
            correct += bound.attainment * len(arrivals) * bound.accuracy
    return Bound(met / max(len(trace), 1), correct / met if met else math.nan)


def _accuracy(result: SimulationResult, which: slice) -> float:
    accuracy = result.accuracy[which][result.outcome[which] == simulator.MET]
    return 100 * float(accuracy.mean()) if len(accuracy) else math.nan


def _last_miss_s(result: SimulationResult, cluster: Cluster) -> float:
    if not cluster.stalls:
        return math.nan
    missed = result.outcome != simulator.MET
    times = np.where(np.isfinite(result.finish_s), result.finish_s, result.deadline_s)[missed]
    return max(float(times.max(initial=0.0)) - max(stall.until_s for stall in cluster.stalls), 0.0)
