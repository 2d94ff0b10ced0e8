"""Compares policies on traces in the simulator: the paper's evaluation as tables, JSON and plots.

    superserve compare --preset all --paper --maf-trace invocations_per_function_md.anon.d01.csv
    superserve compare --preset bursty --scale 1.9 --policies slackfit max-batch fixed:all --plots runs/compare
    superserve compare --policies my_file.py:my_policy slackfit max-batch fixed:all --seeds 1
    superserve compare --trace arrivals.csv --trace-column timestamp --speed 10 --workers 2
    superserve compare --preset policies --profile runs/digits_resnet/export/profiles/cpu.json --scale 5

Presets: maf, bursty, acceleration, policies, worker_kills, dynamics, scale, scale_batches, actuation, actuation_maf, capacity,
slowdown, decisions, all. Each line of a table shows means over the seeds and standard deviations (sd), or - for one seed.
Accuracy is in percent, attainment is a fraction. The settings of the traffic are from the paper's text. The default profile is
a stand-in for the paper's: from memory, unverified, about twice the paper's throughput. --scale makes the device slower or
faster. `maf` and `actuation_maf` need a file of Azure Functions 2019, or a sample of one: --maf-trace FILE. Without it, `all`
leaves them out.
Library: experiments.presets (the presets), experiments.runner (their results and keys), experiments.summaries,
experiments.paper_table, experiments.figures.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np

import superserve_jax as ss
from superserve_jax import cli, shipped
from superserve_jax.experiments import figures, paper_table, presets, runner, summaries
from superserve_jax.experiments.presets import Cell, Grid
from superserve_jax.experiments.summaries import Summary
from superserve_jax.scheduling.policies import create
from superserve_jax.simulation import paper_profile, recorded

COLUMNS: dict[str, Callable[[Summary], str]] = {
    "trace": lambda s: s.trace,
    "scale": lambda s: f"x{s.scale:g}",
    "policy": lambda s: s.policy,
    "attainment": lambda s: f"{s.attainment:.5f}",
    "attainment sd": lambda s: f"{s.sd('attainment'):.5f}" if len(s.results) > 1 else "-",
    "accuracy %": lambda s: f"{s.accuracy:.2f}",
    "accuracy sd": lambda s: f"{s.sd('accuracy'):.2f}" if len(s.results) > 1 else "-",
    "fluid bound %": lambda s: f"{s.mean('fluid_accuracy'):.2f}",
    "queries/s": lambda s: f"{s.mean('rate_qps'):,.0f}",
    "p99 ms": lambda s: f"{s.mean('p99_ms'):.1f}",
    "last miss s": lambda s: f"{s.mean('last_miss_s'):.2f}",
    "decision p50 us": lambda s: f"{s.mean('decision_p50_us'):.2f}",
    "decision p99 us": lambda s: f"{s.mean('decision_p99_us'):.2f}",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      preset: the presets to run; all runs every preset. By default bursty, or none with --trace.
      seeds: the number of seeds; they count from 0.
      policies: replaces the presets' policies: slackfit, slackfit-paper, slackfit-paper:<buckets>,
        slackfit-cumulative:<buckets>, max-batch, max-acc, proteus, least-accurate, fixed:<i>, fixed:all for every subnet
        of the profile, or a policy of your own, such as my_file.py:my_policy (see docs/policies.md).
      profile: a measured latency profile: the JSON file that `superserve measure` names, or an export with one such file. By
        default the stand-in for the paper's.
      scale: factors by which the device is slower; by default 1 and 1.9, or 1 for a measured profile.
      seconds: length of the traffic, for a quick look; by default 60 (maf: 120). Kills and stalls move with it. Refused if
        it is too short for accelerating traffic.
      maf_trace: invocations per minute of Azure Functions 2019 (CSV).
      trace: a CSV file of recorded arrivals, see docs/traces.md.
      trace_column: the column of the arrivals in that file; by default arrival_s, or the only column.
      speed: how many times as fast the recorded arrivals come.
      workers: the number of workers that serve the recorded arrivals.
      slo_ms: the latency objective of the recorded arrivals, if the file has no column slo_ms; by default 36.
      paper: also print a table of the paper's numbers, or this project's goals, and ours.
      jobs: the number of processes; by default one per core.
      json: write the results to this file.
      plots: draw figures into this folder.
    """

    preset: tuple[str, ...] = ()
    seeds: int = 5
    policies: tuple[str, ...] = ()
    profile: pathlib.Path | None = None
    scale: tuple[float, ...] = ()
    seconds: float | None = None
    maf_trace: pathlib.Path | None = None
    trace: pathlib.Path | None = None
    trace_column: str | None = None
    speed: float = 1.0
    workers: int = presets.WORKERS
    slo_ms: float | None = None
    paper: bool = False
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    json: pathlib.Path | None = None
    plots: pathlib.Path | None = None


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    profile = paper_profile.paper_profile() if options.profile is None else ss.Profile.load(profile_file(options.profile))
    cells = chosen_cells(options, profile)
    maf_trace = None if options.maf_trace is None else str(options.maf_trace)
    start = time.monotonic()
    results = runner.evaluate(cells, profile, jobs=options.jobs, maf_trace=maf_trace)
    slo = f"; SLO {presets.SLO_MS:g} ms" if any(cell.preset != "trace" for cell in cells) else ""
    print(f"{len(results)} runs of a policy on a trace, in {time.monotonic() - start:.0f} s, on {profile.device}{slo}")

    for preset, group in summaries.grouped(summaries.summarize(results), lambda s: s.preset).items():
        print(f"\n{preset}")
        filled = {name: cell for name, cell in COLUMNS.items() if any(cell(s) != "nan" for s in group)}
        cli.print_columns(filled, group, left=3)
        if preset == "trace" and all(s.attainment == 1 for s in group):
            print("every policy met every deadline; for a harder comparison, raise --speed, or use fewer --workers")
    if options.paper:
        print(f"\nthe paper's numbers and ours; settings from the paper's text, latencies of {profile.device}")
        comparisons = ((c.preset, f"x{c.scale:g}", c.what, c.paper, c.ours) for c in paper_table.compare(results))
        cli.print_table([paper_table.Comparison._fields, *comparisons], left=5)
    cli.write_results(options.json, results)
    if options.plots:
        for path in figures.draw_profile(profile, options.plots, slo_ms=options.slo_ms or presets.SLO_MS):
            print(f"plot: {path}")
        for path in figures.draw(results, options.plots, profile):
            print(f"plot: {path}")
        for path in figures.draw_over_time(cells, profile, options.plots, maf_trace=maf_trace):
            print(f"plot: {path}")


def chosen_cells(options: Options, profile: ss.Profile) -> list[Cell]:
    """The cells that the options select. Raises an error for unknown names and wrong values before anything runs."""
    cli.refuse_without(options, "trace", "trace_column", "speed", "workers", "slo_ms")
    if options.seeds < 1:
        raise ss.ConfigError(f"--seeds must be 1 or more, got {options.seeds}")
    if bad := [s for s in options.scale if not 0 < s < float("inf")]:
        raise ss.ConfigError(f"--scale must be positive and finite, got {bad[0]}")
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        raise ss.ConfigError(f"--seconds must be positive and finite, got {options.seconds}")
    if options.trace is not None and options.seconds is not None and not options.preset:
        raise ss.ConfigError("--seconds is the length of a preset's traffic; cut the file of --trace, or raise --speed")
    names = list(options.preset or (("bursty",) if options.trace is None else ()))
    if "all" in names:
        names = [name for name in presets.PRESETS if name not in presets.AZURE or options.maf_trace is not None]
        if options.maf_trace is None:
            print("maf and actuation_maf are left out: they need a file of Azure Functions 2019, see --maf-trace")
    scales = options.scale or (None if options.profile is None else (1.0,))
    grids: dict[str, tuple[Grid, ...]] = {name: () for name in names}
    if options.trace is not None:
        grids["trace"] = (recording(options, profile, scales or presets.SCALES),)
    cells = [
        cell
        for name, own in grids.items()
        for cell in presets.cells(
            name,
            own,
            seeds=range(options.seeds),
            scales=scales,
            policies=options.policies or None,
            duration_s=options.seconds,
            subnets=len(profile.rows),
        )
    ]
    for cell in cells:
        presets.check_length(cell)
    for name in dict.fromkeys(name for cell in cells for name in cell.policies):
        create(name, profile)
    if options.maf_trace is None or not options.maf_trace.is_file():
        for cell in cells:
            if cell.traffic.process == "azure":
                presets.MAF.create(0, maf_trace=None if options.maf_trace is None else str(options.maf_trace))
    return cells


def recording(options: Options, profile: ss.Profile, scales: Sequence[float]) -> Grid:
    """The grid of the recorded arrivals. Prints what the file holds, and the load at each scale."""
    slo_ms = presets.SLO_MS if options.slo_ms is None else options.slo_ms
    source = {"path": str(options.trace), "column": options.trace_column, "speed": options.speed, "slo_ms": slo_ms}
    trace = recorded.trace(**source)  # says how it understood the file
    has_slos = bool(np.ndim(trace.slo_ms))
    if has_slos and options.slo_ms is not None:
        raise ss.ConfigError(f"--slo-ms {slo_ms:g} has no effect: {options.trace} has a column slo_ms; leave out one of them")
    slo = "the SLOs of the file" if has_slos else f"SLO {slo_ms:g} ms"
    print(f"{trace.name}: {len(trace):,} queries in {cli.duration(trace.arrivals_s[-1])}, {slo}")
    lengths = np.asarray(trace.lengths).tolist() if np.ndim(trace.lengths) else ()
    for scale in scales:
        scaled = profile.scaled(scale)
        full_qps = [
            options.workers * scaled.throughput_qps(row.subnet, lengths) for row in (profile.rows[0], profile.rows[-1])
        ]
        fastest, best = (f"{100 * trace.mean_qps / qps:,.1f} %" for qps in full_qps)
        print(
            f"load at scale x{scale:g}: {trace.mean_qps:,.0f} queries/s are {fastest} of the throughput of {options.workers} "
            f"worker(s) with the fastest subnet, and {best} with the most accurate one"
        )
    return presets.recording(trace.name, workers=options.workers, **source)


def profile_file(path: pathlib.Path) -> pathlib.Path:
    """The file of a latency profile. `path` may also be an export, or the name of one in the package, with one profile."""
    export = path if path.exists() else shipped.exports().get(str(path), path)
    if not export.is_dir():
        return path
    found = sorted((export / "profiles").glob("*.json"))
    if not found:
        raise ss.ConfigError(f"--profile {path}: no latency profile is in {export}/profiles; run `superserve measure {path}`")
    if len(found) > 1:
        raise ss.ConfigError(f"--profile {path} has several latency profiles; name one of {', '.join(map(str, found))}")
    return found[0]
