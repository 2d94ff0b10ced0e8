"""Replays bursty traffic on the real server, once per policy, and prints one table.

One file because it is one program: half of it is options and the columns of tables.

    superserve replay runs/digits_resnet/export
    superserve replay runs/digits_resnet/export --policies slackfit fixed:largest --seconds 30 --slo-ms 50
    superserve replay runs/digits_resnet/export --policies slackfit --simulate
    superserve replay runs/digits_resnet/export --policies slackfit my_file.py:my_policy fixed:largest
    superserve replay runs/digits_resnet/export --trace arrivals.csv --trace-column timestamp --speed 10
    superserve replay runs/digits_resnet/export --policies slackfit --slow-factor 1.5

All policies get the same arrivals, inputs and SLO. The inputs are the half of the test split that was not profiled (see
training.data.halves); texts keep their lengths. Answers are compared with the labels. So "profiled" is the accuracy that the
policy assumes, and "measured" is the accuracy on examples that neither training nor the policy knows. The last line compares
the default policy with the fixed models (see loadtest.verdict).

Calm and bursts alternate, at rates that follow from the latencies of this machine (see loadtest.bursts): a burst overloads the
most accurate subnet, but not the fastest one. Latencies are measured again before the first policy. The rates and all policies
use them. They are checked after each policy. The replay says so and repeats the policy if they have moved by more than 10 %,
or if the process stood still for more than half of the SLO. --repeats limits the repeats of all policies together. The last
line names the rows that stay disturbed.
- `--trace FILE.csv` replays recorded arrivals instead. See docs/traces.md.
- `--simulate` repeats each replay in the simulator under the measured conditions, see loadtest.sim_vs_real.
- `--slow-factor 1.5` makes every device 1.5 times slower half-way, without telling the server. Each policy runs with the
  online correction (see scheduling.speeds) and without it.
Library: loadtest.loadgen, loadtest.verdict, loadtest.sim_vs_real, serving.server, simulation.traces, plots.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tyro

import superserve_jax as ss
from superserve_jax import cli, plots, progress
from superserve_jax.engines import prepare, profiling
from superserve_jax.engines.base import Engine
from superserve_jax.exports import Model
from superserve_jax.lengths import trim_padding
from superserve_jax.loadtest import bursts, loadgen, sim_vs_real
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.loadtest.sim_vs_real import Stopwatch
from superserve_jax.loadtest.slowed import Slowed
from superserve_jax.loadtest.verdict import Outcome, compare_with_fixed
from superserve_jax.scheduling import policies
from superserve_jax.serving import server
from superserve_jax.serving.options import make_policy
from superserve_jax.serving.server import Server
from superserve_jax.simulation import recorded
from superserve_jax.simulation.traces import Trace
from superserve_jax.training import data
from superserve_jax.training.config import config_from_json
from superserve_jax.training.data import halves

Result = dict[str, Any]  # one policy's numbers, as --json writes them
MOVED = 1.1  # latencies that are this many times as long or as short as before the first policy have moved
TIMING_S, CHECK_S = 5.0, 0.5  # about how long latencies are measured before the first policy, and after each policy
BEAT_S = 5e-3  # of the heartbeat that notices stalls; rare enough to take no time from the server

USUAL: dict[str, Callable[[Result], str]] = {
    "policy": lambda r: r["name"],
    "SLO attainment": lambda r: f"{100 * r['attainment']:.2f} %",
    "accuracy, profiled": lambda r: f"{r['accuracy_profiled']:.2f} %",
    "measured": lambda r: f"{r['accuracy_measured']:.2f} %",
    "p50 ms": lambda r: f"{r['p50_ms']:.1f}",
    "p99 ms": lambda r: f"{r['p99_ms']:.1f}",
}
SLOWED: dict[str, Callable[[Result], str]] = {
    "policy": lambda r: r["name"],
    "correction": lambda r: "on" if r["corrected"] else "off",
    "SLO attainment before": lambda r: f"{100 * r['attainment_before']:.2f} %",
    "after": lambda r: f"{100 * r['attainment_after']:.2f} %",
    "accuracy before": lambda r: f"{r['accuracy_before']:.2f} %",
    "accuracy after": lambda r: f"{r['accuracy_after']:.2f} %",
}
SIMULATED: dict[str, Callable[[Result], str]] = {
    "policy": lambda r: r["name"],
    "SLO attainment": lambda r: f"{100 * r['attainment']:.2f} / {100 * r['simulated_attainment']:.2f} %",
    "attainment difference": lambda r: f"{100 * (r['simulated_attainment'] - r['attainment']):+.2f}",
    "accuracy, profiled": lambda r: f"{r['accuracy_profiled']:.2f} / {r['simulated_accuracy']:.2f} %",
    "accuracy difference": lambda r: f"{r['simulated_accuracy'] - r['accuracy_profiled']:+.2f}",
    "overhead": lambda r: f"{r['overhead_ms']:.2f} ms",
    "stalled": lambda r: f"{r['stalled_s']:.2f} s",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      policies: names such as slackfit, slackfit-paper, max-batch, fixed:0, fixed:largest, or policies of your own, such as
        my_file.py:my_policy (see docs/policies.md). By default both SlackFits and every subnet fixed.
      seconds: length of the traffic, at least 4, because the first burst ends then.
      slo_ms: latency objective; by default 36, or four batches of the most accurate subnet if that is longer.
      calm: (arrival rate between bursts) / (throughput of all workers with the most accurate subnet).
      burst: the arrival rate in a burst: 0 is the throughput of the most accurate subnet, 1 that of the fastest one.
      cv2: squared coefficient of variation of the gaps between arrivals.
      trace: a CSV file of recorded arrivals to replay instead, see docs/traces.md.
      trace_column: the column of the arrivals in that file; by default arrival_s, or the only column.
      speed: how many times as fast the recorded arrivals come.
      batch_sizes: batch sizes to serve with.
      lengths: length buckets of texts; by default powers of two from 16 up to the model's longest length.
      simulate: repeat each replay in the simulator, and print both.
      slow_factor: every batch takes this many times as long from --slow-after on.
      slow_after: when --slow-factor takes effect, as a fraction of the traffic.
      repeats: the largest number of repeats, in all, of policies that the machine disturbed.
      seed: the seed of arrivals and inputs.
      json: write the results to this file.
      plot: write a plot over time to this file.
    """

    export: tyro.conf.Positional[pathlib.Path]
    policies: tuple[str, ...] = ()
    seconds: float = 12.0
    slo_ms: float | None = None
    calm: float = 0.5
    burst: float = 0.5
    cv2: float = 4.0
    trace: pathlib.Path | None = None
    trace_column: str | None = None
    speed: float = 1.0
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    lengths: tuple[int, ...] | None = None
    simulate: bool = False
    slow_factor: float = 1.0
    slow_after: float = 0.5
    repeats: int = 3
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    check_options(options)
    work = prepare_work(options)
    profile = work.profiles[0]
    fixed = {f"fixed:{i}": f"fixed:{i}, subnet of {100 * row.accuracy:.2f} %" for i, row in enumerate(profile.rows)}
    labels = {"slackfit": "SlackFit (default)", "slackfit-paper": "SlackFit of the paper", **fixed}
    names = options.policies or tuple(labels)
    short = policies.labels(names)
    for name in names:  # reports a policy that fails, before the first replay
        make_policy(name, *work.profiles)
        loadgen.rehearse(name, work.profiles, work.trace)
    results: list[Result] = []
    replays: dict[str, Replay] = {}
    ways = (True, False) if options.slow_factor > 1 else (True,)
    check_s = CHECK_S + sum(profiling.measuring_s(p, CHECK_S) for p in work.profiles)  # with the start of the server
    each_s, count = float(work.trace.deadlines_s.max()) + check_s, len(names) * len(ways)
    takes = f"{count} replay{'s' if count > 1 else ''} of {cli.duration(each_s)}: about {cli.duration(count * each_s)}"
    print(f"{takes}, plus up to {options.repeats} repeats", flush=True)
    repeats = options.repeats
    for name in names:
        for corrected in ways:
            while True:
                done, result = replay_policy(options, work, name, corrected=corrected)
                print(f"{short[name]}: {100 * result['attainment']:.2f} % met the SLO", flush=True)
                result["disturbance"] = disturbance(result, work.slo_ms)
                if not result["disturbance"] or not repeats:
                    break
                repeats -= 1
                print(f"{short[name]}: {result['disturbance']}; repeating it ({repeats} more repeats left)", flush=True)
            replays.setdefault(short[name], done)
            results.append({"name": short[name], **result})
    print()
    labelled = ({**result, "name": labels.get(result["name"], result["name"])} for result in results)
    cli.print_columns(SLOWED if options.slow_factor > 1 else USUAL, labelled)
    if options.simulate:
        print("\nthe same traffic in the simulator: real / simulated")
        cli.print_columns(SIMULATED, results)
        print()
    late = [max(result[f"lateness_{p}_ms"] for result in results) for p in ("p50", "p99")]
    print(f"lateness of the load generator, worst policy: p50 {late[0]:.2f} ms, p99 {late[1]:.1f} ms")
    for result in results:
        if problem := result["disturbance"]:
            print(f"{result['name']}: {problem}, so this row may not be comparable; run it again when the machine is quiet")
    verdict = compare_with_fixed(outcomes(results, labels)) if options.slow_factor == 1 else None
    about = {"slo_ms": work.slo_ms, "trace": work.trace.name, "queries": len(work.trace), "device": profile.device}
    compared = verdict and {**dataclasses.asdict(verdict), "gain": verdict.gain if verdict.best else None}
    cli.write_results(
        options.json,
        {
            **about,
            "profile": profile.to_json(),
            "policies": results,
            "verdict": compared,
            "repeats": options.repeats - repeats,
        },
    )
    if options.plot:
        shown = verdict.names if verdict else [n for n in replays if n not in fixed] or list(replays)[:3]
        plots.replay(
            {labels.get(n, n).replace(", subnet of", ","): loadgen.series(replays[n], window_s=0.1) for n in shown},
            options.plot,
            title=f"One server, the same traffic for each policy: {work.trace.name}",
            note=f"measured on {profile.device}, {len(work.engines)} worker(s)",
            slo_ms=work.slo_ms,
            bursts_s=bursts.intervals(options.seconds) if options.trace is None else None,
        )
        print(f"plot: {options.plot}")
    if verdict:
        print(f"\n{verdict}")


def check_options(options: Options) -> None:
    """Raises ConfigError for wrong values, and for options that would have no effect, before anything takes long."""
    cli.refuse_with(options, "trace", "seconds", "calm", "burst", "cv2")
    cli.refuse_without(options, "trace", "trace_column", "speed")
    cli.refuse_without(options, "slow_factor", "slow_after")
    if options.trace is None:
        bursts.check_seconds(options.seconds)
    if options.slo_ms is not None:
        cli.check_above_zero(options, "slo_ms")
    for name in ("calm", "cv2", "repeats"):
        if not getattr(options, name) >= 0:
            raise ss.ConfigError(f"--{name} must be 0 or more, got {getattr(options, name)}")
    if not 0 < options.slow_after < 1:
        raise ss.ConfigError(f"--slow-after is a fraction of the traffic between 0 and 1, got {options.slow_after:g}")
    if options.slow_factor < 1 or (options.slow_factor > 1 and options.simulate):
        raise ss.ConfigError(f"--slow-factor {options.slow_factor}: give 1 or more, and leave out --simulate if it is above 1")


def outcomes(results: Sequence[Result], labels: Mapping[str, str]) -> list[Outcome]:
    """The rows of the table, for the verdict. Fixed models keep their short name, since a sentence names several of them."""
    return [
        Outcome(
            r["name"],
            r["name"] if r["name"].startswith("fixed:") else labels.get(r["name"], r["name"]),
            r["attainment"],
            r["accuracy_profiled"],
            r["accuracy_measured"],
            r["disturbance"],
        )
        for r in results
    ]


def disturbance(result: Result, slo_ms: float) -> str:
    """What disturbed the machine during a replay, in words; empty if nothing did."""
    if abs(math.log(result["slower"])) > math.log(MOVED):
        return f"latencies are now {result['slower']:.2f} times those before the first policy"
    if result["longest_stall_ms"] > slo_ms / 2:
        return f"the process stood still for {result['longest_stall_ms']:.0f} ms"
    return ""


@dataclasses.dataclass(frozen=True)
class Work:
    """What all policies share: engines with their profiles, and queries with their inputs and labels."""

    engines: Sequence[Engine]
    profiles: Sequence[ss.Profile]
    trace: Trace
    inputs: Sequence[np.ndarray]
    labels: np.ndarray
    slo_ms: float

    def slower(self) -> float:
        """By which factor batches take longer than before the first policy, on the engine that changed most."""
        factors = []
        for engine, profile in zip(self.engines, self.profiles, strict=True):
            now = profiling.measure_again(engine, profile, seconds=CHECK_S, background=server.background_traffic)
            factors.append(profiling.slower(now, profile))
        return max(factors, key=lambda factor: abs(math.log(factor)))


def prepare_work(options: Options) -> Work:
    """Loads an export onto the devices, and makes the traffic for it."""
    model = ss.load(options.export)
    trace = None
    if options.trace is not None:  # before anything that takes long
        trace = recorded.trace(options.trace, column=options.trace_column, speed=options.speed)
        print(f"{trace.name}: {len(trace):,} queries in {cli.duration(trace.arrivals_s[-1])}", flush=True)
    loadgen.check_policies(options.policies, options.batch_sizes, subnets=len(model.served))
    inputs, labels = test_examples(model)
    _, engines, profiles = prepare.prepare(
        model, batch_sizes=options.batch_sizes, lengths=options.lengths, background=server.background_traffic
    )
    calls = {"seconds": TIMING_S, "background": server.background_traffic}
    profiles = [profiling.measure_again(e, p, **calls) for e, p in zip(engines, profiles, strict=True)]
    buckets = profiles[0].lengths
    # The server measures the length of each input itself. The arrival rates and the simulator need the lengths earlier.
    lengths = np.array([len(trim_padding(x, engines[0].pad_id)) for x in inputs]) if buckets else np.zeros(len(inputs), int)
    slowest_ms = max(p.rows[-1].latency_ms[-1] for p in profiles)
    slo_ms = options.slo_ms if options.slo_ms is not None else max(36.0, 4 * slowest_ms)
    if trace is not None:
        trace = trace if np.ndim(trace.slo_ms) else dataclasses.replace(trace, slo_ms=slo_ms)
    else:
        names = ("seconds", "calm", "burst", "cv2", "seed")
        settings = {name: getattr(options, name) for name in names}
        trace = bursts.make(profiles, slo_ms=slo_ms, tokens=lengths.tolist() if buckets else (), **settings)
    if not len(trace):
        raise ss.DataError(f"no queries in the trace ({trace.name}): record at least one, or give more --seconds")
    # Random order without replacement, then again: no example is used twice before all others were used once.
    rng = np.random.default_rng(options.seed)
    chosen = np.concatenate([rng.permutation(len(inputs)) for _ in range(-(-len(trace) // len(inputs)))])[: len(trace)]
    print(
        f"{len(trace):,} queries in {trace.arrivals_s[-1]:.1f} s ({trace.name}), SLO {slo_ms:.0f} ms, "
        f"{len(engines)} worker(s) on {', '.join(dict.fromkeys(p.device for p in profiles))}"
    )
    if buckets:
        if np.ndim(trace.lengths):
            chosen = loadgen.examples_of_length(lengths, np.asarray(trace.lengths), seed=options.seed)
        trace = dataclasses.replace(trace, lengths=lengths[chosen])
        p50, p90 = np.percentile(lengths, [50, 90])
        print(f"half of the texts have up to {p50:.0f} tokens, 90 % up to {p90:.0f}; length buckets: {list(buckets)}")
    return Work(engines, profiles, trace, [inputs[i] for i in chosen], labels[chosen], slo_ms)


def test_examples(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the half of the test split that the export was not profiled on.

    Raises ConfigError if the export's config names no data.
    """
    config = config_from_json(model.manifest["training"])
    if config.data is None:
        raise ss.ConfigError(
            "the export was trained on a dataset that its config does not name, so there is nothing to replay; replay "
            "inputs of your own with superserve_jax.loadtest.loadgen.replay"
        )
    inputs, labels = data.open(config.data, decode=False).arrays("test")
    if not all(s.profiled_half for s in model.served):
        return inputs, labels  # an export of an older version, profiled on the whole split
    chosen = ~halves.profiling_half(labels)
    return inputs[chosen], labels[chosen]


def replay_policy(options: Options, work: Work, name: str, *, corrected: bool) -> tuple[Replay, Result]:
    """Serves the traffic with one policy, then times the engines again.

    Returns the outcome of each query, and the numbers for the tables.
    """
    slow_s = options.slow_after * float(work.trace.arrivals_s[-1])
    watches = [Stopwatch(*each) for each in zip(work.engines, work.profiles, strict=True)]
    slowed = [Slowed(engine, options.slow_factor) for engine in work.engines]
    used = watches if options.simulate else slowed if options.slow_factor > 1 else work.engines
    settings = {"slo_ms": work.slo_ms, "max_queue": len(work.trace) + 1, "follow_drift": corrected}
    with (
        sim_vs_real.heartbeat(1e-3 if options.simulate else BEAT_S) as stalls_s,
        Server.from_engines(used, work.profiles, policy=name, **settings) as target,
    ):
        for engine in slowed:
            engine.from_s = time.monotonic() + slow_s
        with progress.clock(float(work.trace.deadlines_s.max()), f"replaying with {policies.labels([name])[name]}"):
            done = loadgen.replay(target, work.trace, work.inputs)
        target.close(drain=False)
    stalls_s = sim_vs_real.during(done, stalls_s)
    result = numbers(done, work.labels) | {"slower": work.slower()}
    result["longest_stall_ms"] = 1e3 * max((until_s - from_s for from_s, until_s in stalls_s), default=0.0)
    if options.simulate:
        machine = sim_vs_real.measured_machine(done, watches, stalls_s)
        again = sim_vs_real.simulate_again(done, work.profiles, name, workers=len(work.profiles), machine=machine)
        result |= {"simulated_attainment": again.attainment, "simulated_accuracy": 100 * again.mean_accuracy}
        result |= {"overhead_ms": machine.overhead_ms, "stalled_s": machine.stalled_s}
    if options.slow_factor > 1:
        result["corrected"] = corrected
        for when, which in ("before", done.arrival_s < slow_s), ("after", done.arrival_s >= slow_s):
            part = loadgen.summarize(done, which)
            result |= {f"attainment_{when}": part.attainment, f"accuracy_{when}": 100 * part.accuracy}
    return done, result


def numbers(done: Replay, labels: np.ndarray) -> Result:
    """One policy's numbers, for the table and for --json."""
    s, met = loadgen.summarize(done), done.met
    submitted = np.isfinite(done.lateness_s)
    lateness_ms = 1e3 * np.percentile(done.lateness_s[submitted], [50, 99]) if submitted.any() else (math.nan, math.nan)
    return {
        "attainment": s.attainment,
        "accuracy_profiled": 100 * s.accuracy,
        "accuracy_measured": 100 * float((done.label == labels)[met].mean()) if met.any() else math.nan,
        "p50_ms": s.p50_ms,
        "p99_ms": s.p99_ms,
        "goodput_qps": s.goodput_qps,
        "lateness_p50_ms": float(lateness_ms[0]),
        "lateness_p99_ms": float(lateness_ms[1]),
    }
