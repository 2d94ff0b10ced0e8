"""Simulates cells side by side: up to a million queries/s, the cost of splitting a queue, of lost hosts, and of round trips.

    python serve/bench/scale.py
    python serve/bench/scale.py --plot runs/scale.png --json runs/scale.json
    python serve/bench/scale.py --only split --seconds 10
    python serve/bench/scale.py --only loss --cells 30 --workers 8 --rate 8000

A cell is one router with its own queue and its workers. All of this is simulated (see `simulation.cells`), so the figures
depend on the seed and not on the machine. Latencies are those of `simulation.paper_profile`. It recalls the paper's GPUs: from
memory, unverified, about twice the paper's throughput. So `growth` and `loss` make them 1.9 times slower, as in the paper's
text.
It prints four tables:
- growth: more and more cells, and as many more queries. For comparison, one queue for all workers.
- split: the same 32 workers and traffic in 1, 2, 4, ... cells. "1 ms" and "50 ms" say how long a balancer does not know of
  answers.
- loss: a cell is lost, or a quarter of the workers of one cell, in the middle of the traffic.
- trips: eight workers whose batches need a round trip to another process.
Traffic is a gamma process. With more cells it is burstier (`--cv2` counts per cell), so that bursts stay as large relative to
the rate.
Library: simulation.cells, simulation.cluster, simulation.traces, plots.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from superserve_jax import cli, errors, plots
from superserve_jax.plots import Line, Panel
from superserve_jax.profile import Profile
from superserve_jax.simulation import cells, metrics, paper_profile, simulator, traces
from superserve_jax.simulation.cells import Cells, CellsResult, LostCell
from superserve_jax.simulation.cluster import Cluster, Outage
from superserve_jax.simulation.simulator import SimulationResult

SPLITS = (1, 2, 4, 8, 16, 32)
LOOKS_MS = (1.0, 50.0)  # how often the balancer of `split` looks at the cells
LOADS = ((0.7, 64.0), (0.9, 4.0))  # of the smallest subnet's throughput, with its cv2
TRIPS_MS = (0.0, 0.5, 1.1, 2.5)
TRIP_LOADS = (0.5, 0.8)
NOTICED_S = (0.1, 0.5)  # until a balancer learns that a cell is lost
PATIENCE_S = 0.26  # until a router knows that a worker is lost; docs/hosts.md has measured 0.13 for a process
WINDOW_S = 0.1

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      only: the tables to print; if left out, all.
      cells: numbers of cells in `growth`; `loss` takes the largest.
      workers: the number of workers of a cell in `growth` and `loss`.
      rate: the queries per second for each cell in `growth` and `loss`.
      cv2: squared coefficient of variation of the gaps between arrivals, for each cell in `growth` and `loss`.
      scale: how many times slower than the recalled GPUs the workers of `growth` and `loss` are.
      slo_ms: the SLO of all queries.
      seconds: the length of the traffic; the smaller systems of `split` and `trips` get four times as much.
      policy: the policy's name.
      seed: the seed of traffic and routing.
      plot: draw the tables into this PNG file.
      json: write the figures to this file.
    """

    only: tuple[Literal["growth", "split", "loss", "trips"], ...] = ()
    cells: tuple[int, ...] = (1, 3, 10, 30)
    workers: int = 32
    rate: float = 33_333.0
    cv2: float = 4.0
    scale: float = 1.9
    slo_ms: float = 36.0
    seconds: float = 2.0
    policy: str = "slackfit"
    seed: int = 0
    plot: pathlib.Path | None = None
    json: pathlib.Path | None = None

    def __post_init__(self):
        if not self.cells or min(self.cells) < 1:
            raise errors.ConfigError(f"cells must be numbers from 1 up, got {self.cells}")
        cli.check_above_zero(self, "workers", "rate", "scale", "slo_ms", "seconds")

    def slowed(self) -> Profile:
        """The profile of a worker in `growth` and `loss`."""
        return paper_profile.paper_profile().scaled(self.scale)

    def traffic(self, count: int) -> traces.Trace:
        """The traffic of that many cells together."""
        rate, cv2 = count * self.rate, count * self.cv2
        return traces.gamma(rate_qps=rate, cv2=cv2, duration_s=self.seconds, slo_ms=self.slo_ms, seed=self.seed)


def figures(result: SimulationResult | CellsResult) -> Row:
    """The figures of a run: attainment as a fraction, accuracy in percent."""
    return {"attainment": result.attainment, "accuracy": 100 * result.mean_accuracy}


def growth(options: Options) -> Iterator[Row]:
    """More and more cells."""
    profile = options.slowed()
    for count in options.cells:
        trace = options.traffic(count)
        one = Cells((Cluster(count * options.workers),))
        each = (Cluster(options.workers),) * count
        for routing, how in ("one queue", one), ("random", Cells(each)), ("two choices", Cells(each, "two-choices")):
            if count > 1 or routing == "one queue":
                start_s = time.process_time()
                result = cells.simulate_cells(profile, options.policy, trace, how, seed=options.seed)
                took = {"queries": len(trace), "cpu_s": time.process_time() - start_s}
                yield {"rate_qps": count * options.rate, "cells": count, "routing": routing, **figures(result), **took}


def split(options: Options) -> Iterator[Row]:
    """32 workers in more and more cells."""
    profile = paper_profile.paper_profile()
    workers = SPLITS[-1]
    capacity_qps = workers * profile.throughput_qps(profile.rows[0].subnet)
    for load, cv2 in LOADS:
        shape = {"rate_qps": load * capacity_qps, "cv2": cv2, "duration_s": 4 * options.seconds}
        trace = traces.gamma(**shape, slo_ms=options.slo_ms, seed=options.seed)
        for count in SPLITS:
            each = (Cluster(workers // count),) * count
            balancers = {"random": Cells(each)} if count > 1 else {"one queue": Cells(each)}
            if count > 1:
                balancers |= {f"two choices, {ms:g} ms": Cells(each, "two-choices", ms) for ms in LOOKS_MS}
            for routing, how in balancers.items():
                result = cells.simulate_cells(profile, options.policy, trace, how, seed=options.seed)
                yield {"load": load, "cv2": cv2, "cells": count, "routing": routing, **figures(result)}


def loss(options: Options) -> Iterator[Row]:
    """A cell is lost, or some workers of one cell."""
    count, at_s = max(options.cells), options.seconds / 2
    trace, profile, cluster = options.traffic(count), options.slowed(), Cluster(options.workers)
    gone = tuple(Outage(worker, at_s, noticed_s=PATIENCE_S) for worker in range(max(options.workers // 4, 1)))
    host = (dataclasses.replace(cluster, outages=gone), *(cluster,) * (count - 1))
    faults: dict[str, Cells] = {"nothing": Cells((cluster,) * count)}
    if count > 1:
        for noticed_s in NOTICED_S:
            lost = (LostCell(0, at_s, noticed_s),)
            faults[f"a cell, noticed after {noticed_s:g} s"] = Cells((cluster,) * count, lost=lost)
    faults[f"{len(gone)} workers of a cell"] = Cells(host)
    if count > 1:
        faults[f"{len(gone)} workers of a cell, two choices"] = Cells(host, "two-choices")
    for fault, how in faults.items():
        found = cells.simulate_cells(profile, options.policy, trace, how, seed=options.seed)
        r = found.queries
        series = metrics.series(r.arrival_s, r.deadline_s, r.finish_s, r.accuracy, r.batch, window_s=WINDOW_S)
        after = r.arrival_s >= at_s + max(NOTICED_S)
        yield {
            "fault": fault,
            "rate_qps": count * options.rate,
            "cells": count,
            **figures(found),
            "missed": int((r.finish_s > r.deadline_s).sum()),
            "attainment_later": metrics.attainment(r.deadline_s[after], r.finish_s[after]),
            "accuracy_later": 100 * metrics.mean_accuracy(r.deadline_s[after], r.finish_s[after], r.accuracy[after]),
            "cell_later": metrics.attainment(*(a[after & (found.cell == 0)] for a in (r.deadline_s, r.finish_s))),
            "time_s": series.time_s.tolist(),
            "attainment_over_time": series.attainment.tolist(),
        }


def trips(options: Options) -> Iterator[Row]:
    """Round trips of batches, hidden or not."""
    profile = paper_profile.paper_profile()
    capacity_qps = 8 * profile.throughput_qps(profile.rows[0].subnet)
    for load in TRIP_LOADS:
        shape = {"rate_qps": load * capacity_qps, "cv2": 4.0, "duration_s": 4 * options.seconds}
        trace = traces.gamma(**shape, slo_ms=options.slo_ms, seed=options.seed)
        for trip_ms in TRIPS_MS:
            for lead_ms in {0.0: None, trip_ms: None}:
                cluster = Cluster(8, round_trip_ms=trip_ms, lead_ms=lead_ms)
                result = simulator.simulate(profile, options.policy, trace, cluster=cluster, seed=options.seed)
                yield {"load": load, "trip_ms": trip_ms, "lead_ms": lead_ms, **figures(result)}


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {"growth": growth, "split": split, "loss": loss, "trips": trips}
SHOWN = {  # the key, the header of its column, and the format of its values
    "load": ("load", "g"),
    "cv2": ("CV2", "g"),
    "rate_qps": ("queries/s", ",.0f"),
    "cells": ("cells", "d"),
    "routing": ("routing", "s"),
    "fault": ("lost", "s"),
    "trip_ms": ("round trip, ms", "g"),
    "lead_ms": ("next batch early by, ms", "g"),
    "attainment": ("attainment", ".4f"),
    "accuracy": ("accuracy, %", ".2f"),
    "missed": ("missed", ",d"),
    "attainment_later": ("attainment later", ".4f"),
    "accuracy_later": ("accuracy later, %", ".2f"),
    "cell_later": ("attainment later, that cell", ".4f"),
    "queries": ("simulated queries", ",d"),
    "cpu_s": ("CPU, s", ".1f"),
}


def report(name: str, rows: list[Row]) -> None:
    """Prints a table."""
    print(f"\n{name}: {PARTS[name].__doc__}")
    keys = [key for key in SHOWN if key in rows[0]]
    cli.print_table([[SHOWN[key][0] for key in keys], *([format(row[key], SHOWN[key][1]) for key in keys] for row in rows)])


def draw(options: Options, found: dict[str, list[Row]], path: pathlib.Path) -> None:
    """Draws the tables except `growth`, whose lines lie on each other."""
    panels: list[Panel] = []

    def line(rows: list[Row], x: str, y: str) -> Line:
        return Line([row[x] for row in rows], [row[y] for row in rows])

    def of(name: str, **values: Any) -> list[Row]:
        return [row for row in found[name] if all(row[key] == value for key, value in values.items())]

    if "split" in found:
        for load, cv2 in LOADS:
            names = dict.fromkeys(row["routing"] for row in found["split"])
            lines = {name: line(of("split", load=load, routing=name), "cells", "accuracy") for name in names}
            title = f"32 workers in cells, load {load:g}, CV2 {cv2:g}"
            panels.append(Panel(title, "cells", "mean serving accuracy (%)", lines, "log2"))
    if "loss" in found:
        lines = {
            row["fault"]: Line(row["time_s"], [100 * a for a in row["attainment_over_time"]], style="-")
            for row in found["loss"][1:]
        }
        count = found["loss"][0]["cells"]
        panels.append(Panel(f"lost, of {count} cells", "arrival (s)", "SLO attainment (%)", lines, most_y=100))
    if "trips" in found:
        lines = {}
        for load in TRIP_LOADS:
            rows = of("trips", load=load)
            lines[f"load {load:g}, one batch at a time"] = line([r for r in rows if not r["lead_ms"]], "trip_ms", "accuracy")
            hidden = [r for r in rows if r["lead_ms"] == r["trip_ms"]]
            lines[f"load {load:g}, next batch early"] = line(hidden, "trip_ms", "accuracy")
        panels.append(Panel("8 workers behind round trips", "round trip (ms)", "mean serving accuracy (%)", lines))
    note = f"simulated; latencies of the paper's GPU {paper_profile.PROVENANCE}; SLO {options.slo_ms:g} ms"
    plots.panels(panels, path, columns=2, title="Cells side by side", note=note, own_legends=True)


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    found: dict[str, list[Row]] = {}
    for name in options.only or PARTS:
        found[name] = list(PARTS[name](options))
        report(name, found[name])
    if options.plot and found.keys() - {"growth"}:
        draw(options, found, options.plot)
    cli.write_results(options.json, found)


if __name__ == "__main__":
    cli.run(main)
