"""The paper's fault-tolerance experiment on the real server: half of the workers are killed one by one while traffic runs.

    python serve/bench/worker_kills.py
    python serve/bench/worker_kills.py --every 2 --policies slackfit max-batch --plot runs/worker_kills.png

Eight fake engines have the latencies of `simulation.paper_profile`: from memory, unverified, about twice the paper's
throughput. 3,500 queries/s arrive. Every --every seconds one worker is killed, until four are left. Queries of a killed worker
run again on other workers. Accuracy falls so that attainment does not. The simulator repeats the same traffic and kills. The
program prints the figures of both.
Library: loadtest.sim_vs_real, serving.server, experiments.presets, simulation.paper_profile, plots.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable

from superserve_jax import cli, plots
from superserve_jax.experiments import presets
from superserve_jax.loadtest import loadgen, sim_vs_real
from superserve_jax.loadtest.sim_vs_real import Interval
from superserve_jax.scheduling import policies
from superserve_jax.serving.options import make_policy
from superserve_jax.simulation import paper_profile

COLUMNS: dict[str, Callable[[Interval], str]] = {
    "seconds": lambda i: f"{i.from_s:.1f} to {i.until_s:.1f}",
    "workers": lambda i: f"{i.workers}",
    "queries": lambda i: f"{i.real.queries:,}",
    "SLO attainment": lambda i: f"{i.real.attainment:.5f} / {i.simulated.attainment:.5f}",
    "accuracy, profiled": lambda i: f"{100 * i.real.accuracy:.2f} / {100 * i.simulated.accuracy:.2f} %",
    "p99 ms": lambda i: f"{i.real.p99_ms:.1f} / {i.simulated.p99_ms:.1f}",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      policies: names of policies, also of your own, see docs/policies.md.
      every: seconds between two kills. The traffic is five times as long.
      slo_ms: the latency objective.
      seed: the seed of the arrivals.
      json: write the results to this file.
      plot: write a plot over time to this file.
    """

    policies: tuple[str, ...] = ("slackfit",)
    every: float = 12.0
    slo_ms: float = presets.SLO_MS
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "every", "slo_ms")


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    [grid] = presets.PRESETS["worker_kills"]
    profile, cluster = paper_profile.paper_profile(), presets.killed(options.every)
    trace = grid.traffics[0].create(options.seed, duration_s=5 * options.every)
    trace = dataclasses.replace(trace, slo_ms=options.slo_ms)
    for name in options.policies:
        make_policy(name, profile)  # reports a mistyped name before the first run
    print(
        f"{len(trace):,} queries in {trace.arrivals_s[-1]:.1f} s ({trace.name}), SLO {options.slo_ms:.0f} ms, "
        f"{cluster.workers} workers with the latencies of {profile.device}"
    )
    logging.getLogger("superserve_jax.serving").setLevel(logging.ERROR)  # failed batches are expected
    results, shown, marks_s = [], {}, []
    for policy, name in policies.labels(options.policies).items():
        run = sim_vs_real.run_with_kills(trace, profile, policy, cluster=cluster, slo_ms=options.slo_ms)
        intervals, health = sim_vs_real.intervals(run), run.health
        print(f"\n{name}: real server / simulator; {health['alive']} of {health['workers']} workers were left")
        cli.print_columns(COLUMNS, intervals)
        results.append({"name": name, "intervals": [dataclasses.asdict(i) for i in intervals], "health": health})
        runs = {name: run.real, f"{name}, simulated": run.simulated}
        shown |= {label: loadgen.series(each, window_s=0.25) for label, each in runs.items()}
        marks_s = [outage.from_s for outage in run.cluster.outages]
    about = {"slo_ms": options.slo_ms, "trace": trace.name, "queries": len(trace)}
    cli.write_results(options.json, {**about, "policies": results})
    if options.plot:
        title = "One worker lost after the other (as the paper's Figure 11)"
        plots.replay(shown, options.plot, marks_s=marks_s, title=title, note=f"latencies: {profile.device}")
        print(f"plot: {options.plot}")


if __name__ == "__main__":
    cli.run(main)
