"""What an overload does to the router: more traffic than the workers carry for a long time, then half of what they carry.

    python serve/bench/overload.py
    python serve/bench/overload.py --admission
    python serve/bench/overload.py --slo-ms 20 200 --overload 1.5
    python serve/bench/overload.py --seconds 600 --json runs/overload.json    # the long run

The engines sleep for what the paper's GPUs take, so this is queue, policy, workers and futures, not a model. Arrivals are
Poisson and open loop. For each phase it prints how many queries were refused, what a refusal cost the client that got it, and
how many of those admitted were met, beside what the policy's simulation says of the same arrivals (of the first 10 s of the
overload, where it is longer). Then the most that ever waited, the memory once a tenth of the overload has passed and at its
end, and how long after the overload the first tenth of a second began in which every query was met.
Library: serving.server.Server, engines.base, simulation.paper_profile, simulation.simulator, loadtest.loadgen.
"""

import collections
import dataclasses
import gc
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from superserve_jax import cli, errors, files
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import endurance, loadgen
from superserve_jax.loadtest.loadgen import Submission
from superserve_jax.serving.futures import Future
from superserve_jax.serving.server import Server
from superserve_jax.simulation import paper_profile, simulator, traces
from superserve_jax.simulation.simulator import Cluster
from superserve_jax.simulation.traces import Trace

X = np.zeros((), np.float32)
CALM = 0.5  # load after the overload
SIMULATED_S = 10.0  # of the overload
WINDOW_S = 0.1
PENDING, MET, MISSED, REFUSED = range(4)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      overload: traffic over what the workers carry with the fastest subnet.
      seconds: length of the overload.
      calm_s: length of what comes after it.
      workers: engines.
      speed: how many times faster they are than the paper's GPUs.
      slo_ms: latency objectives; of several each has an equal share of the queries.
      policy: its name.
      max_queue: queries that may wait.
      admission: refuse what cannot be met.
      expire: drop what cannot be met any more.
      seed: of the arrivals.
      json: write the figures to this file.
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


class Always(Sequence):
    """The same input for every query, in no memory."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return X


class Client:
    """Stands between the generator and the server, and sums up the time that refusals took."""

    def __init__(self, target: Server):
        self.refused, self.refusals_s = 0, 0.0
        self._target = target

    def submit_many(self, xs: list[np.ndarray], **options: Any) -> list[Future]:
        """See `server.Server.submit_many`."""
        start_s = time.thread_time()
        try:
            return self._target.submit_many(xs, **options)
        except errors.QueueFullError:
            self.refusals_s += time.thread_time() - start_s
            self.refused += len(xs)
            raise


def traffic(options: Options, capacity_qps: float, seconds: float) -> Trace:
    """An overload, and then calm."""
    over = traces.gamma(rate_qps=options.overload * capacity_qps, duration_s=seconds, seed=options.seed)
    calm = traces.gamma(rate_qps=CALM * capacity_qps, duration_s=options.calm_s, seed=options.seed + 1)
    trace = Trace(np.concatenate([over.arrivals_s, seconds + calm.arrivals_s]), options.slo_ms[0])
    return trace if len(options.slo_ms) == 1 else trace.mixed(slo_ms=dict.fromkeys(options.slo_ms, 1.0), seed=options.seed)


def served(options: Options, profile: Any, trace: Trace) -> tuple[np.ndarray, dict[str, Any]]:
    """Serves a trace: what became of each query, and figures."""
    fakes = [FakeEngine(profile, name=f"fake:{i}") for i in range(options.workers)]
    became = np.full(len(trace), PENDING, np.uint8)
    unresolved: collections.deque[Submission] = collections.deque()
    wait_s = 1e-3 * max(options.slo_ms) + 5e-3
    most, rss, late_s = 0, {}, 0.0

    def count(sent: Submission) -> None:
        """What is unanswered now has missed its deadline, or is refused."""
        if sent.answers is None:
            became[sent.places] = REFUSED
        else:
            became[sent.places] = [MET if met(future) else MISSED for future in sent.answers]

    with Server.from_engines(
        fakes,
        profile,
        policy=options.policy,
        max_queue=options.max_queue,
        expire=options.expire,
        admission=options.admission,
    ) as target:
        client = Client(target)
        looked_s = 0.0
        for sent in loadgen.submit_when_due(client, trace, Always(len(trace))):
            late_s = max(late_s, sent.now_s - trace.arrivals_s[sent.places[0]])
            unresolved.append(sent)
            while unresolved[0].now_s < sent.now_s - wait_s:
                count(unresolved.popleft())
            if sent.now_s > looked_s + 0.01:
                looked_s, most = sent.now_s, max(most, target.health()["waiting"])
            for mark, at_s in ("begin", 0.1 * options.seconds), ("end", options.seconds):
                if mark not in rss and sent.now_s >= at_s:
                    rss[mark] = endurance.resident_mb()
        time.sleep(wait_s)
        for sent in unresolved:
            count(sent)
        target.close(drain=False)
    return became, {
        "us_per_refusal": 1e6 * client.refusals_s / client.refused if client.refused else float("nan"),
        "waiting_at_most": most,
        "rss_mb": rss,
        "generator_late_ms": 1e3 * late_s,
    }


def met(future: Future) -> bool:
    """Whether a query has been answered by its deadline."""
    return future.done() and future.exception(0) is None and future.result(0).met_slo


def simulated(options: Options, profile: Any, trace: Trace) -> np.ndarray:
    """What becomes of each query of a trace by the simulation."""
    cluster = Cluster(workers=options.workers, max_queue=options.max_queue, expire=options.expire, admission=options.admission)
    outcome = simulator.simulate(profile, options.policy, trace, cluster=cluster).outcome
    return np.select([outcome == simulator.MET, outcome == simulator.REFUSED], [MET, REFUSED], MISSED)


def phase(became: np.ndarray) -> dict[str, Any]:
    """The figures of the queries of a phase, or of one SLO of it."""
    admitted = int((became != REFUSED).sum())
    return {
        "arrived": len(became),
        "refused": len(became) - admitted,
        "met": float((became == MET).mean()),
        "met_of_admitted": float((became == MET).sum() / admitted) if admitted else float("nan"),
    }


def phases(options: Options, trace: Trace, became: np.ndarray, seconds: float) -> dict[str, Any]:
    """The figures of the overload, of it by SLO, and of the calm after it."""
    over = trace.arrivals_s < seconds
    slo_ms = np.broadcast_to(trace.slo_ms, len(trace))
    each = {f"{ms:g}": phase(became[over & (slo_ms == ms)]) for ms in options.slo_ms}
    return {"overload": phase(became[over]), "by_slo": each, "calm": phase(became[~over])}


def recovery_s(trace: Trace, became: np.ndarray, seconds: float) -> float:
    """When, after the overload, the first window began in which every query was met; inf where none did."""
    after = trace.arrivals_s >= seconds
    window = ((trace.arrivals_s[after] - seconds) / WINDOW_S).astype(int)
    missed = np.bincount(window, weights=became[after] != MET)
    perfect: Sequence[int] = np.flatnonzero(missed == 0).tolist()
    return WINDOW_S * perfect[0] if len(perfect) else float("inf")


def measure(options: Options) -> dict[str, Any]:
    """The figures that the program prints."""
    profile = paper_profile.paper_profile().scaled(1 / options.speed)
    capacity_qps = options.workers * profile.throughput_qps(profile.rows[0].subnet)
    short_s = min(options.seconds, SIMULATED_S)
    short = traffic(options, capacity_qps, short_s)
    expected = simulated(options, profile, short)
    trace = traffic(options, capacity_qps, options.seconds)
    gc.collect()
    became, found = served(options, profile, trace)
    return {
        "capacity_qps": capacity_qps,
        **found,
        "served": phases(options, trace, became, options.seconds),
        "simulated": phases(options, short, expected, short_s),
        "recovery_s": recovery_s(trace, became, options.seconds),
        "simulated_recovery_s": recovery_s(short, expected, short_s),
    }


def report(options: Options, found: dict[str, Any]) -> None:
    """Prints the figures of a measurement."""
    asked = ", ".join(name for name in ("admission", "expire") if getattr(options, name))
    print(f"{options.workers} workers carry {found['capacity_qps']:,.0f} queries/s; {options.policy} {asked}".rstrip())
    print("                       arrived    refused     met   of admitted   simulated: met   of admitted")
    real, ours = found["served"], found["simulated"]
    rows = [(f"{options.overload:g} times for {options.seconds:g} s", real["overload"], ours["overload"])]
    if len(options.slo_ms) > 1:
        rows += [(f"  SLO {ms} ms", real["by_slo"][ms], ours["by_slo"][ms]) for ms in real["by_slo"]]
    rows.append((f"{CALM:g} times for {options.calm_s:g} s", real["calm"], ours["calm"]))
    for name, seen, expected in rows:
        shares = (100 * p[share] for p in (seen, expected) for share in ("met", "met_of_admitted"))
        a, b, c, d = shares
        print(f"{name:20}{seen['arrived']:>10,}{seen['refused']:>11,}{a:>6.2f} %{b:>12.2f} %{c:>15.2f} %{d:>12.2f} %")
    print(f"  waiting at most  {found['waiting_at_most']:,} queries, of {options.max_queue:,} allowed")
    print(f"  a refusal        {found['us_per_refusal']:.2f} us of the client's CPU")
    print(f"  memory           {' to '.join(f'{value:.1f}' for value in found['rss_mb'].values())} MB over the overload")
    print(f"  recovery         {found['recovery_s']:.1f} s; simulated {found['simulated_recovery_s']:.1f} s")
    print(f"  generator        {found['generator_late_ms']:.1f} ms late at most")


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    found = measure(options)
    report(options, found)
    if options.json:
        files.write_json(options.json, found)


if __name__ == "__main__":
    cli.run(main)
