"""Serves for a long time, and says of each promise whether it was kept; the exit status is 1 where one was broken.

    python serve/bench/soak.py runs/digits_resnet/export --minutes 10 --plot runs/soak.png
    python serve/bench/soak.py --faults --queries 1000000 --json runs/faults.json

With an export: its real executables, under a load that swings around 80 % of what this machine carries if every subnet serves
as many queries as any other, with three SLOs and some floors, so that the policy changes the subnet all the time. Every second
the resident memory and the latencies are noted. Promised are memory that stays within 2 % after the first minute, latency that
does not drift, an answer to every query, and no executable but those of the start. The generator keeps nothing of a query but
a few counts.

With --faults: the real server on fake engines that take no time, with random faults in everything, by loadtest.storm. Promised
is that every query resolves once, which a history kept outside of the server has to show, and all that promises.Checker knows.
Library: engines.prepare, serving.server, loadtest.endurance, loadtest.storm, loadtest.checker, plots.
"""

import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import superserve_jax as ss
from superserve_jax import cli, files, plots, progress
from superserve_jax.engines import prepare
from superserve_jax.loadtest import endurance
from superserve_jax.loadtest.endurance import Counting, EnduranceTraffic, Second
from superserve_jax.loadtest.storm import Storm, run_storm
from superserve_jax.plots import Line, Panel
from superserve_jax.serving import server
from superserve_jax.serving.server import Server
from superserve_jax.training.compilations import Compilations

MEMORY = 0.02  # by which it may change
DRIFT, SURE = 0.1, 2.33  # by which a latency may grow, and the z from which it is taken for more than chance


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory; left out with --faults.
      minutes: length of the traffic.
      warm_up_s: seconds from the start that are not judged.
      load: mean load, over what the machine carries with all subnets in turn.
      policy: see serve/replay.py.
      slo_ms: the shortest SLO, others are 2 and 4 times as long; if left out, 36 or, on a slow machine, four batches of the
        most accurate subnet.
      batch_sizes: batch sizes to serve with.
      faults: random faults on fake engines instead.
      queries: with --faults, how many.
      workers: with --faults, how many.
      seed: of arrivals, inputs and faults.
      json: write the figures to this file.
      plot: without --faults, write memory and latency over time to this file.
    """

    export: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    minutes: float = 10.0
    warm_up_s: float = 60.0
    load: float = 0.8
    policy: str = "slackfit"
    slo_ms: float | None = None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    faults: bool = False
    queries: int = 1_000_000
    workers: int = 4
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Promise:
    """What was promised, and what was seen; `kept` is None where it could not be judged."""

    what: str
    seen: str
    kept: bool | None


def main() -> None:
    """The program."""
    options = tyro.cli(Options, description=__doc__)
    if options.faults == (options.export is not None):
        raise ss.ConfigError("give either an export's directory, or --faults, which has engines of its own")
    figures, promises = storm(options) if options.faults else soak(options)
    print()
    for promise in promises:
        verdict = {True: "kept", False: "BROKEN", None: "not judged"}[promise.kept]
        print(f"{verdict}: {promise.what}: {promise.seen}")
    if options.json:
        files.write_json(options.json, {**figures, "promises": [dataclasses.asdict(p) for p in promises]})
        print(f"results: {options.json}")
    sys.exit(1 if any(p.kept is False for p in promises) else 0)


# -- an export under load -----------------------------------------------------------------------------------------------------


def soak(options: Options) -> tuple[dict[str, Any], list[Promise]]:
    """Figures and promises of an export under load."""
    if 60 * options.minutes < options.warm_up_s + 3 * endurance.PERIOD_S:
        raise ss.ConfigError(
            f"--minutes {options.minutes:g} leave less than {3 * endurance.PERIOD_S:g} s after the {options.warm_up_s:g} s of "
            "--warm-up-s; serve longer"
        )
    assert options.export is not None
    _, made, profiles = prepare.prepare(
        ss.load(options.export), batch_sizes=options.batch_sizes, background=server.background_traffic
    )
    profile, engines = profiles[0], [Counting(e) for e in made]
    slo_ms = options.slo_ms if options.slo_ms is not None else max(36.0, 4 * max(p.rows[-1].latency_ms[-1] for p in profiles))
    rate_qps = options.load * sum(map(endurance.carried_qps, profiles))
    print(
        f"{rate_qps:,.0f} queries/s on average for {options.minutes:g} min, SLOs of "
        f"{', '.join(f'{f * slo_ms:.0f}' for f in endurance.SLO_FACTORS)} ms, {len(profile.rows)} subnets of "
        f"{options.export}, {len(engines)} worker(s) on {profile.device}"
    )
    compilations, executables = Compilations(), live_executables()
    options_of_server = {"policy": options.policy, "slo_ms": slo_ms, "max_queue": 100_000}
    seconds: list[Second] = []
    with Server.from_engines(engines, profiles, **options_of_server) as target:
        traffic = EnduranceTraffic(target, engines, rate_qps=rate_qps, slo_ms=slo_ms, seed=options.seed)
        start_s = time.monotonic() + 0.1
        for number in progress.track(range(round(60 * options.minutes)), "serving"):
            seconds.append(traffic.second(number, start_s))
        traffic.wait(timeout_s=60.0)
    now = live_executables()
    cli.print_table(table(seconds))
    subnets = len({subnet for e in engines for subnet in e.subnets})
    print(f"{subnets} subnets answered; the generator was late by at most {max(s.lag_ms for s in seconds):.0f} ms")
    promises = [
        *judge(seconds, options.warm_up_s),
        Promise(
            "every future resolves",
            f"{traffic.submitted:,} submitted, {traffic.resolved:,} resolved, {traffic.failed:,} of them to an error; "
            f"{traffic.refused:,} were refused at once",
            traffic.submitted == traffic.resolved,
        ),
        Promise(
            "exactly the executables of the start",
            f"{executables} at the start, {now} at the end, {compilations.count} compiled meanwhile",
            compilations.count == 0 and now == executables,
        ),
    ]
    if options.plot:
        draw(seconds, options.plot)
        print(f"plot: {options.plot}")
    figures = {
        "device": profile.device,
        "rate_qps": rate_qps,
        "slo_ms": slo_ms,
        "submitted": traffic.submitted,
        "resolved": traffic.resolved,
        "subnets": subnets,
        "seconds": [dataclasses.asdict(s) for s in seconds],
    }
    return figures, promises


def judge(seconds: Sequence[Second], warm_up_s: float) -> list[Promise]:
    """The promises about memory and latency, from what was seen after the first `warm_up_s` seconds."""
    judged = [second for second in seconds if second.time_s > warm_up_s]
    memory = [second.memory_mb for second in judged]
    change = max(memory) / min(memory) - 1
    promises = [
        Promise(
            f"resident memory stays within {100 * MEMORY:.0f} % after {warm_up_s:.0f} s",
            f"{min(memory):.1f} to {max(memory):.1f} MB, {100 * change:.2f} % apart"
            if change == change
            else "only Linux tells a process how much of it is resident",
            None if change != change else change <= MEMORY,
        )
    ]
    for name in "p50_ms", "p99_ms":
        growth, z = endurance.growth(endurance.windows(judged, name))
        promises.append(
            Promise(
                f"the {name[:3]} latency does not grow by more than {100 * DRIFT:.0f} %",
                f"{100 * growth:+.1f} % over the run, z = {z:+.1f} (from {SURE} on it is taken for more than chance)",
                not (growth > DRIFT and z > SURE),
            )
        )
    return promises


def table(seconds: Sequence[Second]) -> list[tuple[str, ...]]:
    """Header and one row per minute."""
    header = ("minute", "queries", "p50 ms", "p99 ms", "in time", "changes of the subnet/s", "of batches", "memory MB")
    rows = []
    for start in range(0, len(seconds), 60):
        minute = seconds[start : start + 60]
        changes, batches = sum(s.changes for s in minute), sum(s.batches for s in minute)
        p50, p99 = (np.nanmedian([getattr(s, name) for s in minute]) for name in ("p50_ms", "p99_ms"))
        answers = sum(s.answers for s in minute)
        in_time = sum(s.answers * s.attainment for s in minute if s.answers) / max(answers, 1)
        rows.append(
            (
                f"{1 + start // 60}",
                f"{answers:,}",
                f"{p50:.1f}",
                f"{p99:.1f}",
                f"{100 * in_time:.2f} %",
                f"{changes / len(minute):.0f}",
                f"{100 * changes / max(batches, 1):.0f} %",
                f"{minute[-1].memory_mb:.1f}",
            )
        )
    return [header, *rows]


def draw(seconds: Sequence[Second], path: pathlib.Path) -> None:
    """Memory and latencies over time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    minutes = [second.time_s / 60 for second in seconds]
    memory = {"resident memory": Line(minutes, [s.memory_mb for s in seconds], style="-")}
    latency = {name: Line(minutes, [getattr(s, f"{name}_ms") for s in seconds], style="-") for name in ("p50", "p99")}
    shown = [Panel("memory", "minutes", "MB", memory), Panel("latency", "minutes", "ms", latency)]
    plots.panels(shown, path, columns=2)


def live_executables() -> int:
    """How many executables all devices hold."""
    return sum(len(client.live_executables()) for client in {device.client for device in jax.devices()})


# -- random faults ------------------------------------------------------------------------------------------------------------


def storm(options: Options) -> tuple[dict[str, Any], list[Promise]]:
    """Figures and promises of a server under random faults."""
    logging.getLogger("superserve_jax.serving").setLevel(logging.CRITICAL)  # that batches fail is no news
    plan = Storm(queries=options.queries, workers=options.workers, seed=options.seed)
    print(f"{plan.queries:,} queries of {plan.clients} clients, {plan.workers} workers, seed {plan.seed}")
    told_s = time.monotonic()

    def tell(offered: int) -> None:
        nonlocal told_s
        if time.monotonic() > told_s + 10:
            told_s = time.monotonic()
            print(f"{offered:,} offered", file=sys.stderr, flush=True)

    result = run_storm(plan, on_progress=tell)
    found = result.findings
    rows = [("outcome", "queries"), *((outcome, f"{count:,}") for outcome, count in found.outcomes.items())]
    cli.print_table(rows)
    print(f"faults: {in_words(result.faults)}\nworkers: {in_words(result.workers)}")
    print(
        f"{result.seconds:.0f} s, {found.offered / result.seconds:,.0f} queries/s with the history and its check, "
        f"{found.batches:,} batches, {endurance.resident_mb():.0f} MB resident"
    )
    for example in found.examples:
        print(f"violation: {example}")
    ended = sum(found.outcomes.values())
    promises = [
        Promise("every query that arrived resolves", f"{found.offered:,} arrived, {ended:,} resolved", found.offered == ended),
        Promise("none is lost", f"{found.lost:,} lost", not found.lost),
        Promise("none resolves twice", f"{found.twice:,} twice", not found.twice),
        Promise(
            "right answers, from a subnet that reaches the floor, honest about the deadline; deadlines in order",
            f"{found.violations:,} violations, the above included; {found.compared:,} batches compared with all that waited",
            not found.violations,
        ),
    ]
    return {"storm": dataclasses.asdict(plan), **dataclasses.asdict(result)}, promises


def in_words(counts: Mapping[str, int]) -> str:
    """Counts by name, in a line."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


if __name__ == "__main__":
    cli.run(main)
