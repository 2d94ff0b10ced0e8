"""Replays bursty traffic on the real server, once per policy, and prints one table.

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
use them. They are checked after each policy. A row is disturbed if they have moved by more than 10 %, or if the process stood
still for more than half of the SLO. The replay names these rows. At the end it repeats those that decide the last line, at
most --repeats times in all, and keeps the least disturbed try of each. The last line names the ones that stay disturbed.
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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import superserve_jax as ss
from superserve_jax import cli, plots, progress
from superserve_jax.commands import replay_setup
from superserve_jax.commands.replay_setup import CHECK_S, Options, Work
from superserve_jax.engines import profiling
from superserve_jax.loadtest import bursts, loadgen, sim_vs_real
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.loadtest.sim_vs_real import Stopwatch
from superserve_jax.loadtest.slowed import Slowed
from superserve_jax.loadtest.verdict import Outcome, Verdict, compare_with_fixed
from superserve_jax.scheduling import policies
from superserve_jax.serving.options import make_policy
from superserve_jax.serving.server import Server

Result = dict[str, Any]  # one policy's numbers, as --json writes them
MOVED = 1.1  # latencies that are this many times as long or as short as before the first policy have moved
BEAT_S = 5e-3  # of the heartbeat that notices stalls; rare enough to take no time from the server

USUAL: dict[str, Callable[[Result], str]] = {
    "policy": lambda r: r["label"],
    "SLO attainment": lambda r: f"{100 * r['attainment']:.2f} %",
    "accuracy, profiled": lambda r: f"{r['accuracy_profiled']:.2f} %",
    "measured": lambda r: f"{r['accuracy_measured']:.2f} %",
    "p50 ms": lambda r: f"{r['p50_ms']:.1f}",
    "p99 ms": lambda r: f"{r['p99_ms']:.1f}",
}
SLOWED: dict[str, Callable[[Result], str]] = {
    "policy": lambda r: r["label"],
    "correction": lambda r: "on" if r["corrected"] else "off",
    "SLO attainment before": lambda r: f"{100 * r['attainment_before']:.2f} %",
    "after": lambda r: f"{100 * r['attainment_after']:.2f} %",
    "accuracy before": lambda r: f"{r['accuracy_before']:.2f} %",
    "accuracy after": lambda r: f"{r['accuracy_after']:.2f} %",
}
SIMULATED: dict[str, Callable[[Result], str]] = {
    "policy": lambda r: r["name"],
    "SLO attainment": lambda r: f"{100 * r['attainment']:.2f} / {100 * r['simulated_attainment']:.2f} %",
    "attainment, simulated minus real": lambda r: f"{100 * (r['simulated_attainment'] - r['attainment']):+.2f}",
    "accuracy, profiled": lambda r: f"{r['accuracy_profiled']:.2f} / {r['simulated_accuracy']:.2f} %",
    "accuracy, simulated minus real": lambda r: f"{r['simulated_accuracy'] - r['accuracy_profiled']:+.2f}",
    "overhead": lambda r: f"{r['overhead_ms']:.2f} ms",
    "stalled": lambda r: f"{r['stalled_s']:.2f} s",
}


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    replay_setup.check_options(options)
    work = replay_setup.prepare_work(options)
    names = replay_setup.policy_names(options, work.profiles[0])
    for name in names:  # reports a policy that fails, before the first replay
        make_policy(name, *work.profiles)
        loadgen.rehearse(name, work.profiles, work.trace)
    replays, results, repeats, error = replay_all(options, work, names)
    if not results and error:
        raise error
    verdict = None if error else make_verdict(options, results)
    print_tables(options, results, verdict)
    cli.write_results(options.json, to_json(work, results, verdict) | {"repeats": repeats, "error": error and str(error)})
    if error:
        raise error
    if options.plot:
        plot(options.plot, options, work, replays, results, verdict)
    if verdict:
        print(f"\n{verdict}")


def replay_all(
    options: Options, work: Work, names: Sequence[str]
) -> tuple[list[Replay], list[Result], int, ss.SuperServeError | None]:
    """Replays each policy. Then repeats disturbed rows that decide the verdict, at most options.repeats replays in all.

    Returns the outcomes of the queries and the numbers, both in the order of the table, the number of repeats, and the error
    of a policy that failed. After an error nothing more is replayed.
    """
    short = policies.labels(names)
    each = [(name, corrected) for name in names for corrected in ((True, False) if options.slow_factor > 1 else (True,))]
    pairs = zip(work.engines, work.profiles, strict=True)
    check_s = CHECK_S + sum(profiling.measuring_s(e, p, CHECK_S) for e, p in pairs)  # with the start of the server
    each_s = float(work.trace.deadlines_s.max()) + check_s
    takes = f"{len(each)} replay{'s' if len(each) > 1 else ''} of {cli.duration(each_s)}"
    print(f"{takes}: about {cli.duration(len(each) * each_s)}, plus up to {options.repeats} repeats", flush=True)
    replays, results, repeats = list[Replay](), list[Result](), 0
    try:
        for name, corrected in each:
            done, result = replay_policy(options, work, name, short[name], corrected=corrected)
            replays.append(done)
            results.append(result)
        while repeats < options.repeats and (i := to_repeat(results, make_verdict(options, results))) is not None:
            repeats += 1
            print(f"{results[i]['name']} was disturbed; repeat {repeats} of at most {options.repeats}", flush=True)
            name, corrected = each[i]
            done, result = replay_policy(options, work, name, short[name], corrected=corrected)
            tries = results[i]["tries"] + 1
            if how_disturbed(result, work.slo_ms) < how_disturbed(results[i], work.slo_ms):  # the least disturbed try counts
                replays[i], results[i] = done, result
            results[i] = {**results[i], "tries": tries}
    except ss.SuperServeError as error:
        return replays, results, repeats, error
    return replays, results, repeats, None


def to_repeat(results: Sequence[Result], verdict: Verdict | None) -> int | None:
    """The index of the disturbed row to repeat, if any: the least repeated one of those that decide the verdict.

    Without a verdict, all rows count.
    """
    decide = [i for i, r in enumerate(results) if r["disturbance"] and (verdict is None or r["name"] in verdict.disturbed)]
    return min(decide, key=lambda i: results[i]["tries"], default=None)


def print_tables(options: Options, results: Sequence[Result], verdict: Verdict | None) -> None:
    """Prints the tables, how late queries were sent, and which rows were disturbed."""
    print()
    columns = dict(SLOWED if options.slow_factor > 1 else USUAL)
    if any(result["disturbance"] or result["tries"] > 1 for result in results):
        columns |= {"tries": lambda r: str(r["tries"]), "disturbed": lambda r: "yes" if r["disturbance"] else ""}
    cli.print_columns(columns, results)
    if options.simulate:
        print("\nthe same traffic in the simulator: real / simulated")
        cli.print_columns(SIMULATED, results)
        print()
    late = [max(result[f"lateness_{p}_ms"] for result in results) for p in ("p50", "p99")]
    print(f"queries were sent late by p50 {late[0]:.2f} ms, p99 {late[1]:.1f} ms (worst policy); it counts as latency")
    disturbed = [result for result in results if result["disturbance"]]
    for result in disturbed:
        print(f"{result['name']}: {result['disturbance']}, so this row may not be comparable")
    if disturbed and verdict and not verdict.disturbed:
        print("The last line does not depend on these rows.")
    elif disturbed:
        print("Run the replay when the machine is quiet, give more --repeats, or compare in the simulator: see docs/demo.md.")


def make_verdict(options: Options, results: Sequence[Result]) -> Verdict | None:
    """The default policy beside the fixed models; None without both, or if --slow-factor slows the devices."""
    if options.slow_factor > 1:
        return None
    keys = ("attainment", "accuracy_profiled", "accuracy_measured", "disturbance")
    # A sentence names several fixed models, so they keep their short names there.
    names = [r["name"] if r["name"].startswith("fixed:") else r["label"] for r in results]
    rows = zip(results, names, strict=True)
    return compare_with_fixed([Outcome(r["name"], name, *(r[key] for key in keys)) for r, name in rows])


def to_json(work: Work, results: Sequence[Result], verdict: Verdict | None) -> dict[str, Any]:
    """What --json writes, without the number of repeats."""
    compared = None
    if verdict:
        gain = verdict.gain if verdict.best else None
        compared = {**dataclasses.asdict(verdict), "disturbed": verdict.disturbed, "gain": gain}
    profile = work.profiles[0]
    about = {"slo_ms": work.slo_ms, "trace": work.trace.name, "queries": len(work.trace), "device": profile.device}
    return {**about, "profile": profile.to_json(), "policies": results, "verdict": compared}


def plot(
    path: pathlib.Path,
    options: Options,
    work: Work,
    replays: Sequence[Replay],
    results: Sequence[Result],
    verdict: Verdict | None,
) -> None:
    """Plots the policies of the verdict and your own over time. Without a verdict: all but the fixed, or the first three."""
    adaptive = [result["name"] for result in results if not result["name"].startswith("fixed:")]
    own = [short for name, short in policies.labels(options.policies).items() if policies.is_custom(name)]
    shown = [*verdict.names, *own] if verdict else adaptive or [result["name"] for result in results[:3]]
    lines = {}
    for done, result in zip(replays, results, strict=True):
        if result["name"] in shown:  # with --slow-factor the first of its two rows, which has the correction
            lines.setdefault(result["label"].replace(", subnet of", ","), loadgen.series(done, window_s=0.1))
    plots.replay(
        lines,
        path,
        title=f"One server, the same traffic for each policy: {work.trace.name}",
        note=f"measured on {work.profiles[0].device}, {len(work.engines)} worker(s)",
        slo_ms=work.slo_ms,
        bursts_s=bursts.intervals(options.seconds) if options.trace is None else None,
    )
    print(f"plot: {path}")


def how_disturbed(result: Result, slo_ms: float) -> float:
    """How much the machine was disturbed during a replay, relative to the limit: above 1, the row is disturbed."""
    return max(abs(math.log(result["slower"])) / math.log(MOVED), result["longest_stall_ms"] / (slo_ms / 2))


def disturbance(result: Result, slo_ms: float) -> str:
    """What disturbed the machine during a replay, in words; empty if nothing did."""
    if how_disturbed(result, slo_ms) <= 1:
        return ""
    if abs(math.log(result["slower"])) > math.log(MOVED):
        return f"latencies are now {result['slower']:.2f} times those before the first policy"
    return f"the process stood still for {result['longest_stall_ms']:.0f} ms"


def replay_policy(options: Options, work: Work, name: str, short: str, *, corrected: bool) -> tuple[Replay, Result]:
    """Serves the traffic with one policy, then times the engines again, and prints the attainment.

    Returns the outcome of each query, and the numbers for the tables. `short` is the policy's short name.
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
        with progress.clock(float(work.trace.deadlines_s.max()), f"replaying with {short}"):
            done = loadgen.replay(target, work.trace, work.inputs)
        target.close(drain=False)
    stalls_s = sim_vs_real.during(done, stalls_s)
    result = {"name": short, "label": label(short, work.profiles[0]), **numbers(done, work.labels), "slower": work.slower()}
    result["longest_stall_ms"] = 1e3 * max((until_s - from_s for from_s, until_s in stalls_s), default=0.0)
    result |= {"disturbance": disturbance(result, work.slo_ms), "tries": 1}
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
    problem = f"; {result['disturbance']}" if result["disturbance"] else ""
    print(f"{short}: {100 * result['attainment']:.2f} % met the SLO{problem}", flush=True)
    return done, result


def label(short: str, profile: ss.Profile) -> str:
    """The policy's name in tables and plots."""
    fixed = {f"fixed:{i}": f"fixed:{i}, subnet of {100 * row.accuracy:.2f} %" for i, row in enumerate(profile.rows)}
    return {"slackfit": "slackfit (default)", "slackfit-paper": "slackfit-paper (the paper's rule)", **fixed}.get(short, short)


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
