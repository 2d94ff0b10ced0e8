"""Replays bursty traffic on the real server, once per policy, and prints one table.

    python serve/replay.py runs/digits_resnet/export
    python serve/replay.py runs/digits_resnet/export --policies slackfit fixed:largest --seconds 30 --slo-ms 50
    python serve/replay.py runs/digits_resnet/export --policies slackfit --simulate
    python serve/replay.py runs/digits_resnet/export --policies slackfit --slow-factor 1.5
    python serve/replay.py --kill-every 12

All policies face the same arrivals, inputs and SLO; inputs are the dataset's test examples, texts with the lengths that they
have. The traffic calms down and bursts in turn; its rates are set from this machine's measured latencies, so that a burst
overloads the most accurate subnet but not the fastest. Replies are compared with the real labels. With --trace FILE.csv
recorded arrivals are replayed instead (a column arrival_s, see simulation.traces.load).
With --simulate each replay is run once more in the simulator, on the measured profile and under what was seen of the machine
meanwhile (see loadtest.sim_vs_real), and both are printed.
With --slow-factor 1.5 every device becomes 1.5 times slower half-way, without telling the server; each policy is replayed with
the online correction (see scheduling.speeds) and without it, and what it attains before and after is printed.
With --kill-every it is the paper's fault-tolerance experiment, which needs no export: eight workers on the paper's latencies,
half of which are killed one after another while 3,500 queries/s come in, beside the same in the simulator.
Library: loadtest.loadgen, serving.server, scheduling.policies, simulation.traces, simulation.metrics, loadtest.sim_vs_real,
loadtest.worker_kills,
plots.
"""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro

import superserve_jax as ss
from superserve_jax import cli, files, plots
from superserve_jax.engines import prepare
from superserve_jax.engines.base import Engine, Wrapper
from superserve_jax.experiments import presets
from superserve_jax.exports import Model
from superserve_jax.lengths import trim_padding
from superserve_jax.loadtest import loadgen, sim_vs_real, worker_kills
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.loadtest.sim_vs_real import Heartbeat, Machine, Stopwatch
from superserve_jax.serving import server
from superserve_jax.serving.server import Server
from superserve_jax.simulation import metrics, paper_profile, traces
from superserve_jax.simulation.metrics import Series
from superserve_jax.simulation.simulator import SimulationResult
from superserve_jax.simulation.traces import Trace
from superserve_jax.training import data
from superserve_jax.training.config import config_from_json


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory; left out with --kill-every.
      policies: names of policies, such as slackfit, slackfit-paper, max-batch, fixed:0, fixed:largest; if left out, both
        SlackFits and every subnet fixed.
      seconds: length of the traffic; if left out, 9, or five times --kill-every.
      slo_ms: latency objective; if left out, 36 or, on a slow machine, four batches of the most accurate subnet.
      calm: arrival rate between bursts, over the capacity of the most accurate subnet.
      burst: arrival rate in a burst, over the capacity of the fastest subnet.
      cv2: squared coefficient of variation of the gaps.
      trace: recorded arrivals to replay instead.
      batch_sizes: batch sizes to serve with.
      lengths: of texts, the length buckets to serve with; if left out, powers of two from 16 up to the model's longest.
      kill_every: seconds after which one more of eight workers is killed.
      simulate: run each replay once more in the simulator, and print both.
      slow_factor: from some time on, every batch takes so many times as long.
      slow_after: from when, as a share of the traffic.
      seed: of arrivals and inputs.
      json: write the results to this file.
      plot: write a plot over time to this file; with --kill-every, if left out, to runs/worker_kills.png.
    """

    export: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    policies: tuple[str, ...] = ()
    seconds: float | None = None
    slo_ms: float | None = None
    calm: float = 0.3
    burst: float = 0.45
    cv2: float = 4.0
    trace: pathlib.Path | None = None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] | None = None
    kill_every: float | None = None
    simulate: bool = False
    slow_factor: float = 1.0
    slow_after: float = 0.5
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    if options.seconds is not None and not options.seconds > 0:
        raise ss.ConfigError(f"--seconds must be positive, got {options.seconds:g}")
    if not 0 < options.slow_after < 1:
        raise ss.ConfigError(f"--slow-after is a share of the traffic between 0 and 1, got {options.slow_after:g}")
    if options.slow_factor < 1 or (options.slow_factor > 1 and options.simulate):
        raise ss.ConfigError(f"--slow-factor {options.slow_factor}: give 1 or more, and above 1 no --simulate")
    if options.kill_every is not None:
        return kill_workers(options, options.kill_every)
    if options.export is None:
        raise ss.ConfigError(
            "which export? give its directory, or --kill-every 12 for the paper's fault-tolerance experiment without one"
        )
    model = ss.load(options.export)
    inputs, labels = test_examples(model)
    _, engines, profiles = prepare.prepare(
        model, batch_sizes=options.batch_sizes, lengths=options.lengths, background=server.background_traffic
    )
    profile = profiles[0]
    # What an example's length is, the server finds out by itself; rates and the simulator need to know it.
    lengths = np.array([len(trim_padding(x, engines[0].pad_id)) for x in inputs]) if profile.lengths else None
    slowest = max(p.rows[-1].latency_ms[-1] for p in profiles)
    slo_ms = options.slo_ms if options.slo_ms is not None else max(36.0, 4 * slowest)
    trace = make_trace(options, profiles, slo_ms=slo_ms, lengths=lengths)
    if not len(trace):
        raise ss.DataError(f"no queries ({trace.name}): record at least one, or replay more --seconds")
    # Every example in turn, shuffled anew each time round, so that a policy's queries show all of them alike.
    rng = np.random.default_rng(options.seed)
    chosen = np.concatenate([rng.permutation(len(inputs)) for _ in range(-(-len(trace) // len(inputs)))])[: len(trace)]
    inputs, truth = [inputs[i] for i in chosen], labels[chosen]
    if lengths is not None:
        trace = dataclasses.replace(trace, lengths=lengths[chosen])
    print(
        f"{len(trace):,} queries in {trace.arrivals_s[-1]:.1f} s ({trace.name}), SLO {slo_ms:.0f} ms, "
        f"{len(engines)} worker(s) on {', '.join(dict.fromkeys(p.device for p in profiles))}"
    )
    if lengths is not None:
        p50, p90 = np.percentile(lengths, [50, 90])
        print(f"half of the texts have up to {p50:.0f} tokens, 90 % up to {p90:.0f}; length buckets: {list(profile.lengths)}")

    names = options.policies or ("slackfit", "slackfit-paper", *(f"fixed:{i}" for i in range(len(profile.rows))))
    for name in names:
        server.make_policy(name, *profiles)  # a mistyped name should not wait for its turn
    results, replays = [], {}
    runs = [(name, follow) for name in names for follow in ((True, False) if options.slow_factor > 1 else (True,))]
    for name, follow in runs:
        slowed = [Slowed(e, options.slow_factor) for e in engines]
        watches = [Stopwatch(*each) for each in zip(engines, profiles, strict=True)]
        heart = Heartbeat()
        used = watches if options.simulate else slowed if options.slow_factor > 1 else engines
        with (
            heart if options.simulate else contextlib.nullcontext(),
            Server.from_engines(
                used, profiles, policy=name, slo_ms=slo_ms, max_queue=len(trace) + 1, follow_drift=follow
            ) as target,
        ):
            for engine in slowed:
                engine.from_s = time.monotonic() + options.slow_after * float(trace.arrivals_s[-1])
            done = loadgen.replay(target, trace, inputs)
            target.close(drain=False)
        replays[name] = replays.get(name, done)
        results.append(summarise(name, done, truth))
        if options.simulate:
            results[-1] |= simulated(name, done, profiles, sim_vs_real.measured_machine(done, watches, heart))
        if options.slow_factor > 1:
            results[-1] |= {"corrected": follow, **halves(done, options.slow_after)}
        print(f"{name}: {100 * results[-1]['attainment']:.2f} % in time", flush=True)

    print()
    cli.print_table(table(results, profile) if options.slow_factor == 1 else slowdown(results))
    if options.simulate:
        print("\nthe same traffic in the simulator: real / simulated")
        cli.print_table(comparison(results))
        print()
    late = [max(r[f"lateness_{p}_ms"] for r in results) for p in ("p50", "p99")]
    print(f"the generator was late by at most {late[0]:.2f} ms at the median and {late[1]:.1f} ms at the 99th percentile")
    if options.json:
        about = {"slo_ms": slo_ms, "trace": trace.name, "queries": len(trace), "device": profile.device}
        files.write_json(options.json, {**about, "profile": profile.to_json(), "policies": results})
        print(f"results: {options.json}")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        shown = [n for n in names if not n.startswith("fixed")] + [n for n in names if n.startswith("fixed")][
            :: max(1, len(names))
        ]
        plots.replay({name: timeline(replays[name]) for name in shown}, options.plot)
        print(f"plot: {options.plot}")


def kill_workers(options: Options, every_s: float) -> None:
    """What --kill-every does: the paper's fault-tolerance experiment, with its traffic, on its latencies."""
    if options.export is not None:
        raise ss.ConfigError(f"--kill-every has engines of its own and needs no export; leave {options.export} out")
    if not every_s > 0:
        raise ss.ConfigError(f"--kill-every must be a positive number of seconds, got {every_s:g}")
    [grid] = presets.PRESETS["worker_kills"]
    profile, cluster = paper_profile.paper_profile(), presets.killed(every_s)
    slo_ms = presets.SLO_MS if options.slo_ms is None else options.slo_ms
    trace = grid.traffics[0].create(options.seed, duration_s=options.seconds if options.seconds is not None else 5 * every_s)
    trace = dataclasses.replace(trace, slo_ms=slo_ms)
    names = options.policies or ("slackfit",)
    for name in names:
        server.make_policy(name, profile)
    print(
        f"{len(trace):,} queries in {trace.arrivals_s[-1]:.1f} s ({trace.name}), SLO {slo_ms:.0f} ms, "
        f"{cluster.workers} workers that take as long as a {profile.device}"
    )
    logging.getLogger("superserve_jax.serving").setLevel(logging.ERROR)  # that they fail is no news
    results, shown = [], {}
    for name in names:
        run = worker_kills.run(trace, profile, name, cluster=cluster, slo_ms=slo_ms)
        found = worker_kills.intervals(run)
        health = run.health
        print(f"\n{name}, on the real server / simulated; {health['alive']} of {health['workers']} workers were left")
        cli.print_table(cli.table(KILLS, found))
        results.append({"name": name, "intervals": [dataclasses.asdict(i) for i in found], "health": health})
        shown |= {name: timeline(run.real, window_s=0.25), f"{name}, simulated": timeline(run.simulated, window_s=0.25)}
        marks_s = [outage.from_s for outage in run.cluster.outages]
    if options.json:
        files.write_json(options.json, {"slo_ms": slo_ms, "trace": trace.name, "queries": len(trace), "policies": results})
        print(f"results: {options.json}")
    plot = options.plot or pathlib.Path("runs/worker_kills.png")
    plot.parent.mkdir(parents=True, exist_ok=True)
    plots.replay(shown, plot, marks_s=marks_s)
    print(f"plot: {plot}")


def test_examples(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the test split that an export was trained for. Raises ConfigError where it names none."""
    config = config_from_json(model.manifest["training"])
    if config.data is None:
        raise ss.ConfigError(
            "the export was trained on a dataset that its config does not name, so there is nothing to replay; replay "
            "inputs of your own with superserve_jax.loadtest.loadgen.replay"
        )
    return data.open(config.data).arrays("test")


def make_trace(options: Options, profiles: Sequence[ss.Profile], *, slo_ms: float, lengths: np.ndarray | None) -> Trace:
    """Recorded arrivals, or calm and burst in turn at rates that suit this machine, and of texts their lengths."""
    if options.trace is not None:
        return traces.load(options.trace, slo_ms=slo_ms)
    tokens = [] if lengths is None else lengths.tolist()
    calm = options.calm * sum(p.throughput_qps(p.rows[-1].subnet, tokens) for p in profiles)
    burst = options.burst * sum(p.throughput_qps(p.rows[0].subnet, tokens) for p in profiles)
    step_s = 0.5
    pattern = [calm, calm, calm, burst, calm, calm]
    seconds = 9.0 if options.seconds is None else options.seconds
    rates = [pattern[i % len(pattern)] for i in range(max(1, round(seconds / step_s)))]
    trace = traces.steps(rates_qps=rates, step_s=step_s, cv2=options.cv2, slo_ms=slo_ms, seed=options.seed)
    return dataclasses.replace(trace, name=f"bursts of {burst:,.0f} queries/s on {calm:,.0f}, CV^2 {options.cv2:g}")


def summarise(name: str, done: Replay, truth: np.ndarray) -> dict[str, Any]:
    """One policy's figures, as --json has them."""
    s = metrics.summary(done.arrival_s, done.deadline_s, done.finish_s, done.accuracy)
    submitted = np.isfinite(done.lateness_s)
    lateness = 1e3 * np.percentile(done.lateness_s[submitted], [50, 99]) if submitted.any() else (float("nan"),) * 2
    met = done.met
    return {
        "name": name,
        "attainment": s.attainment,
        "accuracy_profiled": 100 * s.accuracy,
        "accuracy_measured": 100 * float((done.label == truth)[met].mean()) if met.any() else float("nan"),
        "p50_ms": s.p50_ms,
        "p99_ms": s.p99_ms,
        "goodput_qps": s.goodput_qps,
        "lateness_p50_ms": float(lateness[0]),
        "lateness_p99_ms": float(lateness[1]),
    }


def table(results: list[dict[str, Any]], profile: ss.Profile) -> list[tuple[str, ...]]:
    """Header and one row per policy."""
    about = {
        "slackfit": "SlackFit, guarded (default)",
        "slackfit-paper": "SlackFit of the paper",
        **{f"fixed:{i}": f"fixed:{i}, subnet of {100 * r.accuracy:.2f} %" for i, r in enumerate(profile.rows)},
    }
    header: tuple[str, ...] = ("policy", "SLO attainment", "accuracy, profiled", "measured", "p50 ms", "p99 ms")
    rows: list[tuple[str, ...]] = [
        (
            str(about.get(r["name"], r["name"])),
            f"{100 * r['attainment']:.2f} %",
            f"{r['accuracy_profiled']:.2f} %",
            f"{r['accuracy_measured']:.2f} %",
            f"{r['p50_ms']:.1f}",
            f"{r['p99_ms']:.1f}",
        )
        for r in results
    ]
    return [header, *rows]


def simulated(name: str, done: Replay, profiles: Sequence[ss.Profile], machine: Machine) -> dict[str, float]:
    """What --simulate adds to a policy's figures."""
    again = sim_vs_real.simulate_again(done, profiles, name, workers=len(profiles), machine=machine)
    return {
        "simulated_attainment": again.attainment,
        "simulated_accuracy": 100 * again.mean_accuracy,
        "overhead_ms": machine.overhead_ms,
        "stalled_s": machine.stalled_s,
    }


def comparison(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Header and one row per policy: the real server and the simulator."""
    header = ("policy", "SLO attainment", "difference", "accuracy, profiled", "difference", "overhead", "stood still")
    rows = [
        (
            r["name"],
            f"{100 * r['attainment']:.2f} / {100 * r['simulated_attainment']:.2f} %",
            f"{100 * (r['simulated_attainment'] - r['attainment']):+.2f}",
            f"{r['accuracy_profiled']:.2f} / {r['simulated_accuracy']:.2f} %",
            f"{r['simulated_accuracy'] - r['accuracy_profiled']:+.2f}",
            f"{r['overhead_ms']:.2f} ms",
            f"{r['stalled_s']:.2f} s",
        )
        for r in results
    ]
    return [header, *rows]


KILLS = {
    "seconds": "{0.from_s:.1f} to {0.until_s:.1f}",
    "workers": "{0.workers}",
    "queries": "{0.real.queries:,}",
    "SLO attainment": "{0.real.attainment:.5f} / {0.simulated.attainment:.5f}",
    "accuracy, profiled": "{0.real.accuracy:.2%} / {0.simulated.accuracy:.2%}",
    "p99 ms": "{0.real.p99_ms:.1f} / {0.simulated.p99_ms:.1f}",
}


class Slowed(Wrapper):
    """An engine whose batches take `factor` times as long from `from_s` on, on the clock `time.monotonic`."""

    def __init__(self, inner: Engine, factor: float):
        super().__init__(inner)
        self.from_s = float("inf")
        self._factor = factor

    def run(self, subnet: ss.Subnet, batch_size: int, inputs: list[np.ndarray]) -> Any:
        """See `engines.base.Engine.run`."""
        start_s = time.monotonic()
        outputs = super().run(subnet, batch_size, inputs)
        if start_s >= self.from_s:
            time.sleep((self._factor - 1) * (time.monotonic() - start_s))
        return outputs


def halves(done: Replay, share: float) -> dict[str, float]:
    """Attainment and profiled accuracy of the queries before the devices became slower, and of those after."""
    figures = {}
    slow_s = share * done.arrival_s[-1]
    for when, which in ("before", done.arrival_s < slow_s), ("after", done.arrival_s >= slow_s):
        s = metrics.summary(*(a[which] for a in (done.arrival_s, done.deadline_s, done.finish_s, done.accuracy)))
        figures |= {f"attainment_{when}": s.attainment, f"accuracy_{when}": 100 * s.accuracy}
    return figures


def slowdown(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Header and two rows per policy, with the online correction and without."""
    header = ("policy", "correction", "SLO attainment before", "after", "accuracy before", "after")
    kinds = ("attainment_before", 100), ("attainment_after", 100), ("accuracy_before", 1), ("accuracy_after", 1)
    return [
        header,
        *((r["name"], "on" if r["corrected"] else "off", *(f"{f * r[k]:.2f} %" for k, f in kinds)) for r in results),
    ]


def timeline(done: Replay | SimulationResult, *, window_s: float = 0.1) -> Series:
    """The run over time."""
    return metrics.series(done.arrival_s, done.deadline_s, done.finish_s, done.accuracy, done.batch, window_s=window_s)


if __name__ == "__main__":
    cli.run(main)
