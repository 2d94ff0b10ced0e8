"""Simulates a day of an autoscaled server, beside fixed fleets: accuracy, deadlines and worker-hours.

    python serve/bench/autoscale.py
    python serve/bench/autoscale.py --night 0.2 --plot runs/autoscale.png --json runs/autoscale.json
    python serve/bench/autoscale.py --maf-trace my_day.csv --mean-qps 500 --least 1 --most 8 --fixed 2 3 4

The day has the calls per minute of a file of Azure Functions 2019, scaled to a mean rate. The default is a sample of 762
functions. It has many short bursts, and its nights are hardly calmer than its days. `--night` makes them calmer.
A quarter of a second of traffic (`--sample-s`) represents each minute, see `scaling.day`. So the figures depend on the seed
and not on the machine.
Latencies are those of `simulation.paper_profile`, 1.9 times slower. It recalls the paper's GPUs: from memory, unverified.
"Served accuracy" counts missed deadlines as 0. A "turn" is a worker that is added after one was removed, or removed after one
was added.
Library: scaling.day, scaling.controller, simulation.azure, plots.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from superserve_jax import cli, errors, plots
from superserve_jax.plots import Line, Panel
from superserve_jax.scaling import day, what_if
from superserve_jax.scaling.controller import Goal
from superserve_jax.scaling.day import Day
from superserve_jax.simulation import azure, paper_profile

HOUR = 60  # minutes
SAMPLE = pathlib.Path(__file__).parents[2] / "tests" / "data" / "maf2019_762fn_total.csv"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      maf_trace: a CSV file of Azure Functions 2019.
      mean_qps: the mean arrival rate of the day.
      night: the rate at midnight relative to noon. The rates of the file are multiplied by a cosine; 1 leaves them.
      minutes: simulate only the first minutes of the day.
      target: the served accuracy to keep, a fraction.
      first: the number of workers at the beginning.
      least: the smallest number of workers.
      most: the largest number of workers.
      low_s: the times for which the accuracy must be too low before workers are added, in seconds; one autoscaler for each.
      fixed: the fixed fleets for comparison.
      start_s: how many seconds a new worker takes until it serves.
      sample_s: how many seconds of each minute are simulated.
      cv2: squared coefficient of variation of the gaps between arrivals within a minute.
      scale: how many times slower than the recalled GPUs the workers are.
      seed: the seed of the arrivals.
      plot: draw the day into this PNG file.
      json: write the figures to this file.
    """

    maf_trace: pathlib.Path = SAMPLE
    mean_qps: float = 3000.0
    night: float = 1.0
    minutes: int | None = None
    target: float = 0.77
    first: int = 6
    least: int = 2
    most: int = 24
    low_s: tuple[float, ...] = (60.0, 300.0, 600.0)
    fixed: tuple[int, ...] = (6, 7, 8, 10, 12)
    start_s: float = 180.0
    sample_s: float = 0.25
    cv2: float = 4.0
    scale: float = 1.9
    seed: int = 0
    plot: pathlib.Path | None = None
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "mean_qps", "night", "first", "scale", "sample_s")
        if not self.low_s and not self.fixed:
            raise errors.ConfigError("low_s and fixed are both empty; give at least one number")
        if self.minutes is not None and self.minutes < 1:
            raise errors.ConfigError(f"minutes must be 1 or more, got {self.minutes}")


def rates(options: Options) -> np.ndarray:
    """The arrival rate of each minute."""
    calls = azure.invocations_per_minute(options.maf_trace).astype(float)
    hours = 2 * np.pi * np.arange(len(calls)) / len(calls)
    shaped = calls * ((1 + options.night) - (1 - options.night) * np.cos(hours))
    return (shaped * options.mean_qps / shaped.mean())[: options.minutes]


def simulate(options: Options) -> dict[str, Day]:
    """The days by the name of the fleet."""
    goals = {
        f"autoscaled, {low_s:g} s": Goal(options.target, options.most, options.least, low_s=low_s) for low_s in options.low_s
    }
    goals |= {f"{n} workers": Goal(options.target, n, n) for n in options.fixed}
    profile, arriving = paper_profile.paper_profile().scaled(options.scale), rates(options)
    shape: dict[str, Any] = {
        "start_s": options.start_s,
        "sample_s": options.sample_s,
        "cv2": options.cv2,
        "seed": options.seed,
    }
    return {
        name: day.simulate_day(
            profile, arriving, goal, first=max(options.first, goal.least) if goal.most > goal.least else None, **shape
        )
        for name, goal in goals.items()
    }


def by_hour(found: Day) -> list[float]:
    """The served accuracy of each hour with queries, in percent."""
    hours = (found.served[i : i + HOUR] for i in range(0, len(found.served), HOUR))
    return [100 * (what_if.total(hour).accuracy or 0.0) for hour in hours]


def figures(found: Day) -> dict[str, Any]:
    """The figures of a day, for the table and the JSON file."""
    return {
        "attainment": found.attainment,
        "accuracy": 100 * found.accuracy,
        "lowest_hour": min(by_hour(found)),
        "worker_hours": found.worker_hours,
        "fewest": int(found.alive.min()),
        "most": int(found.alive.max()),
        "changes": len(found.changes),
        "turns": found.turns,
        "alive": found.alive.tolist(),
    }


def report(options: Options, table: dict[str, dict[str, Any]]) -> None:
    """Prints the table."""
    print(f"mean {options.mean_qps:,.0f} queries/s, target {100 * options.target:g} %, workers start in {options.start_s:g} s")
    header = ["fleet", "attainment", "accuracy, %", "served, lowest hour, %", "worker-hours", "workers", "changes", "turns"]
    lines = [
        [
            name,
            f"{row['attainment']:.4f}",
            f"{row['accuracy']:.2f}",
            f"{row['lowest_hour']:.2f}",
            f"{row['worker_hours']:.1f}",
            f"{row['fewest']} to {row['most']}",
            str(row["changes"]),
            str(row["turns"]),
        ]
        for name, row in table.items()
    ]
    cli.print_table([header, *lines])


def draw(options: Options, days: dict[str, Day], path: pathlib.Path) -> None:
    """Draws the rate, the workers, and the served accuracy of each hour."""
    arriving = rates(options)
    hours = (np.arange(len(arriving)) / HOUR).tolist()
    panels = [
        Panel(
            "arrivals", "hour", "arrivals (queries/s)", {"each minute": Line(hours, arriving.tolist(), style="-", color="0.3")}
        ),
        Panel("fleet", "hour", "workers", {n: Line(hours, d.alive.tolist(), style="-") for n, d in days.items()}),
        Panel(
            "accuracy; missed deadlines count as 0",
            "hour",
            "served accuracy (%)",
            {n: Line(list(range(len(by_hour(d)))), by_hour(d), style=".-") for n, d in days.items()},
            level=(100 * options.target, f"target, {100 * options.target:g} %"),
        ),
    ]
    note = f"simulated; latencies of the paper's GPU {paper_profile.PROVENANCE}, {options.scale:g} times slower"
    plots.panels(panels, path, title="A day of an autoscaled server", note=note)


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    days = simulate(options)
    table = {name: figures(found) for name, found in days.items()}
    report(options, table)
    if options.plot:
        draw(options, days, options.plot)
    cli.write_results(options.json, table)


if __name__ == "__main__":
    cli.run(main)
