"""Compares policies on traces in the simulator: the paper's evaluation as tables, JSON and plots.

    python serve/compare.py --preset all --paper --maf-trace invocations_per_function_md.anon.d01.csv
    python serve/compare.py --preset bursty --scale 1.9 --policies slackfit max-batch fixed:all --plots runs/compare
    python serve/compare.py --preset policies --profile runs/digits_resnet/export/profiles/cpu.json --scale 0.1

Presets: maf, bursty, acceleration, policies, faults, scale, actuation, capacity, slowdown, decisions, or all. Each row of a
table is a mean over the seeds, +- the standard deviation; accuracy is in percent, attainment a fraction. The traffic is the
paper's whatever the profile: --scale makes the device slower or faster. Without --profile it is the paper's, reconstructed.
`maf` reads a file of Azure Functions 2019, or a sample of one: --maf-trace FILE; without it `all` leaves maf out.
Library: experiments.presets (the presets), experiments.runner (their rows, and what one holds), readings, findings, figures.
"""

import dataclasses
import os
import pathlib
import time

import tyro

import superserve_jax as ss
from superserve_jax import cli, files
from superserve_jax.experiments import figures, paper_table, presets, runner
from superserve_jax.experiments.presets import Cell
from superserve_jax.experiments.summaries import Summary, summarize
from superserve_jax.scheduling.policies import create
from superserve_jax.simulation import paper_profile


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      preset: which experiments, one or several, or all.
      seeds: number of seeds, from 0 up.
      policies: instead of the presets': slackfit, slackfit-paper, slackfit-paper:<buckets>, slackfit-cumulative:<buckets>,
        max-batch, max-acc, proteus, least-accurate, fixed:<i>, or fixed:all for every subnet of the profile.
      profile: a measured latency profile (JSON, see serve/measure.py); if left out, the paper's, reconstructed.
      scale: factors by which the device is slower, instead of the presets' 1 and 1.9; 1 for a measured profile.
      seconds: length of the traffic, instead of the presets' 60 (maf: 120); for a quick look.
      maf_trace: invocations per minute of Azure Functions 2019 (CSV).
      paper: print the paper's figures, or the goal where it has none, beside ours.
      jobs: processes; if left out, one per core.
      json: write the rows to this file.
      plots: draw into this folder.
    """

    preset: tuple[str, ...] = ("bursty",)
    seeds: int = 5
    policies: tuple[str, ...] = ()
    profile: pathlib.Path | None = None
    scale: tuple[float, ...] = ()
    seconds: float | None = None
    maf_trace: pathlib.Path | None = None
    paper: bool = False
    jobs: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    json: pathlib.Path | None = None
    plots: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    profile = paper_profile.paper_profile() if options.profile is None else ss.Profile.load(options.profile)
    cells = chosen_cells(options, profile)
    maf_trace = None if options.maf_trace is None else str(options.maf_trace)
    start = time.monotonic()
    rows = runner.evaluate(cells, profile, jobs=options.jobs, maf_trace=maf_trace)
    print(f"{len(rows)} runs on {profile.device} in {time.monotonic() - start:.0f} s; SLO {presets.SLO_MS:g} ms")

    summaries = summarize(rows)
    for preset in dict.fromkeys(s.preset for s in summaries):
        print(f"\n{preset}")
        cli.print_table(table([s for s in summaries if s.preset == preset]))
    if options.paper:
        print("\nthe paper beside ours")
        header = ("preset", "scale", "what", "the paper", "ours")
        found = paper_table.findings(rows)
        cli.print_table([header, *((f.preset, f"x{f.scale:g}", f.what, f.reference, f.ours) for f in found)], left=5)
    if options.json:
        files.write_json(options.json, rows)
        print(f"\nrows: {options.json}")
    if options.plots:
        for path in figures.draw(rows, options.plots):
            print(f"plot: {path}")
        for path in figures.draw_over_time(cells, profile, options.plots, maf_trace=maf_trace):
            print(f"plot: {path}")


def chosen_cells(options: Options, profile: ss.Profile) -> list[Cell]:
    """What the options ask for. Raises for names that are not known, or values that cannot be, before anything runs."""
    if options.seeds < 1:
        raise ss.ConfigError(f"--seeds must be 1 or more, got {options.seeds}")
    if bad := [s for s in options.scale if not 0 < s < float("inf")]:
        raise ss.ConfigError(f"--scale must be positive and finite, got {bad[0]}")
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        raise ss.ConfigError(f"--seconds must be positive and finite, got {options.seconds}")
    names = list(options.preset)
    if "all" in names:
        names = [name for name in presets.PRESETS if name != "maf" or options.maf_trace is not None]
        if "maf" not in names:
            print("maf is left out: it needs a file of Azure Functions 2019, see --maf-trace")
    scales = options.scale or (None if options.profile is None else (1.0,))
    cells = [
        cell
        for name in names
        for cell in presets.cells(
            name,
            seeds=range(options.seeds),
            scales=scales,
            policies=options.policies or None,
            duration_s=options.seconds,
            subnets=len(profile.rows),
        )
    ]
    for name in dict.fromkeys(name for cell in cells for name in cell.policies):
        create(name, profile)
    if options.maf_trace is None or not options.maf_trace.is_file():
        for cell in cells:
            if cell.traffic.process == "azure":
                presets.MAF.create(0, maf_trace=None if options.maf_trace is None else str(options.maf_trace))
    return cells


def table(summaries: list[Summary]) -> list[tuple[str, ...]]:
    """Header and one row per trace, scale and policy of one preset; columns that nothing fills are left out."""
    extras = {
        "queries/s": lambda s: f"{s.mean('rate_qps'):,.0f}",
        "p99 ms": lambda s: f"{s.mean('p99_ms'):.1f}",
        "last miss s": lambda s: f"{s.mean('last_miss_s'):.2f}",
        "decision p50 us": lambda s: f"{s.mean('decision_p50_us'):.2f}",
        "p99 us": lambda s: f"{s.mean('decision_p99_us'):.2f}",
    }
    filled = {name: cell for name, cell in extras.items() if not all(cell(s) == "nan" for s in summaries)}
    rows = [("trace", "scale", "policy", "attainment", "+-", "accuracy %", "+-", "fluid %", *filled)]
    for s in summaries:
        rows.append(
            (
                s.trace,
                f"x{s.scale:g}",
                s.policy,
                f"{s.attainment:.5f}",
                f"{s.attainment_sd:.5f}",
                f"{s.accuracy:.2f}",
                f"{s.accuracy_sd:.2f}",
                f"{s.fluid_accuracy:.2f}",
                *((text if (text := cell(s)) != "nan" else "") for cell in filled.values()),
            )
        )
    return rows


if __name__ == "__main__":
    cli.run(main)
