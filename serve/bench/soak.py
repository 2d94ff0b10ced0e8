"""Serves for a long time and checks guarantees. The exit status is 1 if one is broken.

    python serve/bench/soak.py runs/digits_resnet/export --minutes 10 --plot runs/soak.png

It serves the real executables. The load rises and falls around 80 % of what this machine carries if all
subnets serve equally many queries. There are three SLOs and some floors, so the policy changes the subnet all the time. Memory
and latencies are measured every second. The guarantees are:
- Resident memory stays within 2 % after the first minute.
- p50 and p99 latency do not grow by more than 10 %.
- Every future resolves.
- Nothing is compiled after the start.
Library: loadtest.endurance, engines.prepare, serving.server, plots.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from guarantees import Guarantee, end, in_words

import superserve_jax as ss
from superserve_jax import cli, plots, progress
from superserve_jax.engines import prepare
from superserve_jax.loadtest import endurance
from superserve_jax.loadtest.endurance import Counting, EnduranceTraffic, Second
from superserve_jax.plots import Line, Panel
from superserve_jax.serving import server
from superserve_jax.serving.server import Server
from superserve_jax.training.compilations import Compilations

MEMORY = 0.02  # the largest change of resident memory that is allowed
GROWTH = 0.1  # the largest growth of a latency that is allowed
CHANCE = 0.01  # growth with a p-value of this or more counts as chance


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      export: the export's directory.
      minutes: length of the traffic.
      warm_up_s: seconds at the start whose memory and latency do not count.
      load: mean load, as a fraction of what the machine carries if all subnets serve equally many queries.
      policy: a policy's name, see serve/replay.py.
      slo_ms: the shortest SLO; the others are 2 and 4 times as long. By default it is 36, or four batches of the most accurate
        subnet if that is longer.
      batch_sizes: batch sizes to serve with.
      seed: the seed of all random choices.
      json: write the results to this file.
      plot: write a plot of memory and latency over time to this file.
    """

    export: Annotated[pathlib.Path, tyro.conf.Positional]
    minutes: float = 10.0
    warm_up_s: float = 60.0
    load: float = 0.8
    policy: str = "slackfit"
    slo_ms: float | None = None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    seed: int = 0
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    cli.check_above_zero(options, "minutes", "load")
    figures, guarantees = soak(options, options.export)
    end(guarantees, figures, options.json)


def soak(options: Options, export: pathlib.Path) -> tuple[dict[str, Any], list[Guarantee]]:
    """The results and the guarantees of an export under load."""
    if 60 * options.minutes < options.warm_up_s + 3 * endurance.PERIOD_S:
        raise ss.ConfigError(
            f"--minutes {options.minutes:g} leave less than {3 * endurance.PERIOD_S:g} s after the {options.warm_up_s:g} s of "
            "--warm-up-s; serve longer"
        )
    _, made, profiles = prepare.prepare(ss.load(export), batch_sizes=options.batch_sizes, background=server.background_traffic)
    device, engines = profiles[0].device, [Counting(engine) for engine in made]
    slowest_ms = max(p.rows[-1].latency_ms[-1] for p in profiles)
    slo_ms = options.slo_ms if options.slo_ms is not None else max(36.0, 4 * slowest_ms)
    rate_qps = options.load * sum(map(endurance.carried_qps, profiles))
    print(
        f"{rate_qps:,.0f} queries/s on average for {options.minutes:g} min, SLOs of "
        f"{', '.join(f'{factor * slo_ms:.0f}' for factor in endurance.SLO_FACTORS)} ms, {len(profiles[0].rows)} subnets of "
        f"{export}, {len(engines)} worker(s) on {device}"
    )
    compilations, executables = Compilations(), live_executables()
    with Server.from_engines(engines, profiles, policy=options.policy, slo_ms=slo_ms, max_queue=100_000) as target:
        traffic = EnduranceTraffic(target, engines, rate_qps=rate_qps, slo_ms=slo_ms, seed=options.seed)
        start_s = time.monotonic() + 0.1
        seconds = [traffic.second(i, start_s) for i in progress.track(range(round(60 * options.minutes)), "serving")]
        traffic.wait(timeout_s=60.0)
        subnets = len(target.snapshot()["subnets"])
    now = live_executables()
    print_minutes(seconds)
    print(f"{subnets} subnets answered; the generator was late by at most {max(s.lag_ms for s in seconds):.0f} ms")
    if options.plot:
        draw(seconds, options.plot)
        print(f"plot: {options.plot}")
    counts = {name: getattr(traffic, name) for name in ("submitted", "resolved", "failed", "refused")}
    guarantees = [
        *steadiness(seconds, options.warm_up_s),
        Guarantee("every future resolves", in_words(counts), traffic.submitted == traffic.resolved),
        Guarantee(
            "nothing is compiled after the start",
            f"{executables} executables at the start, {now} at the end, {compilations.count} compiled meanwhile",
            compilations.count == 0 and now == executables,
        ),
    ]
    figures = {"device": device, "rate_qps": rate_qps, "slo_ms": slo_ms, **counts, "subnets": subnets}
    return {**figures, "seconds": [dataclasses.asdict(s) for s in seconds]}, guarantees


def steadiness(seconds: Sequence[Second], warm_up_s: float) -> list[Guarantee]:
    """The guarantees about memory and latency. The first `warm_up_s` seconds do not count."""
    counted = [second for second in seconds if second.time_s > warm_up_s]
    memory = [second.memory_mb for second in counted]
    change = max(memory) / min(memory) - 1
    guarantees = [
        Guarantee(
            f"resident memory stays within {100 * MEMORY:.0f} % after {warm_up_s:.0f} s",
            f"{min(memory):.1f} to {max(memory):.1f} MB, a change of {100 * change:.2f} %",
            change <= MEMORY,
        )
    ]
    for name in "p50_ms", "p99_ms":
        growth, chance = endurance.growth(endurance.windows(counted, name))
        guarantees.append(
            Guarantee(
                f"the {name[:3]} latency does not grow by more than {100 * GROWTH:.0f} %",
                f"{100 * growth:+.1f} % over the run, p = {chance:.2g} (growth counts only if p < {CHANCE:g})",
                not (growth > GROWTH and chance < CHANCE),
            )
        )
    return guarantees


def print_minutes(seconds: Sequence[Second]) -> None:
    """Prints a table with one line per minute."""
    lines = [("minute", "queries", "p50 ms", "p99 ms", "in time", "subnet changes/s", "per batch", "memory MB")]
    for start in range(0, len(seconds), 60):
        minute = seconds[start : start + 60]
        answers, met, changes, batches = (
            sum(getattr(second, name) for second in minute) for name in ("answers", "met", "changes", "batches")
        )
        p50, p99 = (np.nanmedian([getattr(second, name) for second in minute]) for name in ("p50_ms", "p99_ms"))
        line = f"{1 + start // 60}", f"{answers:,}", f"{p50:.1f}", f"{p99:.1f}", f"{met / max(answers, 1):.2%}"
        rates = f"{changes / len(minute):.0f}", f"{changes / max(batches, 1):.0%}"
        lines.append((*line, *rates, f"{minute[-1].memory_mb:.1f}"))
    cli.print_table(lines)


def draw(seconds: Sequence[Second], path: pathlib.Path) -> None:
    """Draws memory and latencies over time."""
    minutes = [second.time_s / 60 for second in seconds]
    memory = {"resident memory": Line(minutes, [s.memory_mb for s in seconds], style="-")}
    latency = {name: Line(minutes, [getattr(s, f"{name}_ms") for s in seconds], style="-") for name in ("p50", "p99")}
    memory_panel = Panel("memory", "time (minutes)", "memory (MB)", memory)
    latency_panel = Panel("latency", "time (minutes)", "latency (ms)", latency)
    plots.panels([memory_panel, latency_panel], path, columns=2, title="A server at constant load")


def live_executables() -> int:
    """The number of executables on all devices."""
    return sum(len(client.live_executables()) for client in {device.client for device in jax.devices()})


if __name__ == "__main__":
    cli.run(main)
