"""Overloads the router for a long time, then sends half of what the workers carry.

    python serve/bench/overload.py
    python serve/bench/overload.py --admission
    python serve/bench/overload.py --slo-ms 20 200 --overload 1.5
    python serve/bench/overload.py --seconds 600 --json runs/overload.json    # the long run

The engines only sleep, as long as `simulation.paper_profile` says. It recalls the paper's GPUs: from memory, unverified, about
twice the paper's throughput. So this measures queue, policy, workers and futures, not a model.
Arrivals are Poisson and open loop. It prints:
- for each phase: the refused queries, and the share of admitted queries that met their deadlines. It prints these shares for
  the server and for the simulator. The simulated overload is generated in the same way, but lasts at most 10 s;
- the longest queue, the CPU time of a refusal, and the memory after a tenth of the overload and at its end;
- the recovery: the time from the end of the overload to the first tenth of a second in which every query met its deadline.
Library: loadtest.loadgen, loadtest.endurance, serving.server, simulation.simulator, simulation.paper_profile.
"""

import collections
import dataclasses
import gc
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from superserve_jax import cli, errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import endurance, loadgen
from superserve_jax.loadtest.loadgen import Submission
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.simulation import paper_profile, simulator, traces
from superserve_jax.simulation.cluster import Cluster
from superserve_jax.simulation.traces import Trace

X = np.zeros((), np.float32)
CALM = 0.5  # load after the overload
SIMULATED_S = 10.0  # the longest overload that is simulated
WINDOW_S = 0.1
MISSED, MET, REFUSED = range(3)  # outcomes


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      overload: (arrival rate) / (throughput of all workers with the fastest subnet).
      seconds: the length of the overload.
      calm_s: the length of the calm after the overload.
      workers: the number of workers, with one engine each.
      speed: how many times faster the engines are than the recalled GPUs.
      slo_ms: the latency objectives; each gets an equal share of the queries.
      policy: the policy's name.
      max_queue: the number of queries that may wait.
      admission: refuse queries whose deadline cannot be met.
      expire: drop waiting queries whose deadline can no longer be met.
      seed: the seed of the arrivals.
      json: write the results to this file.
    """

    overload: float = 3.0
    seconds: float = 10.0
    calm_s: float = 5.0
    workers: int = 4
    speed: float = 1.0
    slo_ms: tuple[float, ...] = (36.0,)
    policy: str = "slackfit"
    max_queue: int = 10_000
    admission: bool = False
    expire: bool = False
    seed: int = 0
    json: pathlib.Path | None = None

    def __post_init__(self):
        if not self.slo_ms:
            raise errors.ConfigError("slo_ms is empty; give at least one, such as 36")
        cli.check_above_zero(self, "overload", "seconds", "calm_s", "workers", "speed", "max_queue")

    @property
    def limits(self) -> dict[str, Any]:
        """The options that server and simulator share."""
        return {"max_queue": self.max_queue, "expire": self.expire, "admission": self.admission}


class Same(Sequence):
    """The same input for every query, without using memory for it."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return X


class Client:
    """Passes queries on to the server, and measures the CPU time of refusals."""

    def __init__(self, target: Server):
        self.refused, self.refusals_s = 0, 0.0
        self._target = target

    def submit_many(self, xs: list[np.ndarray], **options: Any) -> list[Future]:
        """See `serving.server.Server.submit_many`."""
        start_s = time.thread_time()
        try:
            return self._target.submit_many(xs, **options)
        except errors.QueueFullError:
            self.refusals_s += time.thread_time() - start_s
            self.refused += len(xs)
            raise


def traffic(options: Options, capacity_qps: float, seconds: float) -> Trace:
    """The arrivals: `seconds` of overload, then calm."""
    over = traces.gamma(rate_qps=options.overload * capacity_qps, duration_s=seconds, seed=options.seed)
    calm = traces.gamma(rate_qps=CALM * capacity_qps, duration_s=options.calm_s, seed=options.seed + 1)
    trace = Trace(np.concatenate([over.arrivals_s, seconds + calm.arrivals_s]), options.slo_ms[0])
    return trace if len(options.slo_ms) == 1 else trace.mixed(slo_ms=dict.fromkeys(options.slo_ms, 1.0), seed=options.seed)


def serve(options: Options, profile: Profile, trace: Trace) -> tuple[np.ndarray, dict[str, Any]]:
    """Serves a trace. Returns the outcome of each query, and other measurements."""
    fakes = [FakeEngine(profile, name=f"fake:{i}") for i in range(options.workers)]
    outcomes = np.full(len(trace), MISSED, np.uint8)
    unresolved: collections.deque[Submission] = collections.deque()
    wait_s = 1e-3 * max(options.slo_ms) + 5e-3  # after that, a query without an answer has missed its deadline
    longest, memory_mb, late_s, looked_s = 0, {}, 0.0, 0.0

    def count(sent: Submission) -> None:
        outcomes[sent.places] = (
            REFUSED if sent.answers is None else [MET if met(future) else MISSED for future in sent.answers]
        )

    with Server.from_engines(fakes, profile, policy=options.policy, **options.limits) as target:
        client = Client(target)
        for sent in loadgen.submit_when_due(client, trace, Same(len(trace))):
            late_s = max(late_s, sent.now_s - trace.arrivals_s[sent.places[0]])
            unresolved.append(sent)
            while unresolved[0].now_s < sent.now_s - wait_s:
                count(unresolved.popleft())
            if sent.now_s > looked_s + 0.01:
                looked_s, longest = sent.now_s, max(longest, target.health()["waiting"])
            for mark, at_s in ("begin", 0.1 * options.seconds), ("end", options.seconds):
                if mark not in memory_mb and sent.now_s >= at_s:
                    memory_mb[mark] = endurance.resident_mb()
        time.sleep(wait_s)
        for sent in unresolved:
            count(sent)
        target.close(drain=False)
    return outcomes, {
        "us_per_refusal": 1e6 * client.refusals_s / client.refused if client.refused else math.nan,
        "waiting_at_most": longest,
        "rss_mb": memory_mb,
        "generator_late_ms": 1e3 * late_s,
    }


def met(future: Future) -> bool:
    """Whether a query was answered by its deadline."""
    return future.done() and future.exception(0) is None and future.result(0).met_slo


def simulate(options: Options, profile: Profile, trace: Trace) -> np.ndarray:
    """The outcome of each query in the simulator."""
    cluster = Cluster(workers=options.workers, **options.limits)
    outcome = simulator.simulate(profile, options.policy, trace, cluster=cluster).outcome
    return np.select([outcome == simulator.MET, outcome == simulator.REFUSED], [MET, REFUSED], MISSED)


def phases(options: Options, trace: Trace, outcomes: np.ndarray, seconds: float) -> dict[str, Any]:
    """Counts outcomes during the overload, in total and by SLO, and during the calm. Adds the seconds until the recovery."""
    over = trace.arrivals_s < seconds
    slo_ms = np.broadcast_to(trace.slo_ms, len(trace))
    each = {f"{ms:g}": counts(outcomes[over & (slo_ms == ms)]) for ms in options.slo_ms}
    window = ((trace.arrivals_s[~over] - seconds) / WINDOW_S).astype(int)
    perfect = np.flatnonzero(np.bincount(window, weights=outcomes[~over] != MET) == 0)
    recovery_s = WINDOW_S * float(perfect[0]) if len(perfect) else math.inf
    return {"overload": counts(outcomes[over]), "by_slo": each, "calm": counts(outcomes[~over]), "recovery_s": recovery_s}


def counts(outcomes: np.ndarray) -> dict[str, Any]:
    """Counts queries and refusals. Also computes the share of all, and of the admitted queries, that met their deadlines."""
    admitted, hits = int((outcomes != REFUSED).sum()), int((outcomes == MET).sum())
    return {
        "arrived": len(outcomes),
        "refused": len(outcomes) - admitted,
        "met": hits / len(outcomes) if len(outcomes) else math.nan,
        "met_of_admitted": hits / admitted if admitted else math.nan,
    }


def measure(options: Options) -> dict[str, Any]:
    """What the program prints and writes."""
    profile = paper_profile.paper_profile().scaled(1 / options.speed)
    capacity_qps = options.workers * profile.throughput_qps(profile.rows[0].subnet)
    short_s = min(options.seconds, SIMULATED_S)
    short, trace = (traffic(options, capacity_qps, seconds) for seconds in (short_s, options.seconds))
    simulated = phases(options, short, simulate(options, profile, short), short_s)
    gc.collect()
    outcomes, measured = serve(options, profile, trace)
    served = phases(options, trace, outcomes, options.seconds)
    return {"capacity_qps": capacity_qps, **measured, "served": served, "simulated": simulated}


def report(options: Options, found: dict[str, Any]) -> None:
    """Prints the results."""
    asked = ", ".join(name for name in ("admission", "expire") if getattr(options, name))
    print(f"{options.workers} workers carry {found['capacity_qps']:,.0f} queries/s; {options.policy} {asked}".rstrip())
    real, ours = found["served"], found["simulated"]
    phases = [(f"{options.overload:g} times for {options.seconds:g} s", real["overload"], ours["overload"])]
    if len(options.slo_ms) > 1:
        phases += [(f"  SLO {ms} ms", real["by_slo"][ms], ours["by_slo"][ms]) for ms in real["by_slo"]]
    phases.append((f"{CALM:g} times for {options.calm_s:g} s", real["calm"], ours["calm"]))
    lines = [["traffic", "arrived", "refused", "met", "met of admitted", "simulated: met", "simulated: met of admitted"]]
    for name, seen, expected in phases:
        shares = [f"{100 * p[key]:.2f} %" for p in (seen, expected) for key in ("met", "met_of_admitted")]
        lines.append([name, f"{seen['arrived']:,}", f"{seen['refused']:,}", *shares])
    cli.print_table(lines)
    print(f"  longest queue    {found['waiting_at_most']:,} queries, of {options.max_queue:,} allowed")
    print(f"  CPU per refusal  {found['us_per_refusal']:.2f} us, in the client's thread")
    print(f"  memory           {' to '.join(f'{value:.1f}' for value in found['rss_mb'].values())} MB during the overload")
    print(f"  recovery         {real['recovery_s']:.1f} s; simulated {ours['recovery_s']:.1f} s")
    print(f"  generator        {found['generator_late_ms']:.1f} ms late at most")


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    found = measure(options)
    report(options, found)
    cli.write_results(options.json, found)


if __name__ == "__main__":
    cli.run(main)
