"""Measures the gateway over HTTP and gRPC with an open-loop load generator, and servers of other projects beside it.

    pip install 'superserve-jax[serve,peers]'
    python serve/bench/gateway.py --peer mosec --json runs/gateway.json --plot runs/gateway.png
    python serve/bench/gateway.py --parts bounds --only HTTP
    python serve/bench/gateway.py --parts rates --peer mosec litserve ray --peer-python peers/bin/python

Four engines sleep as long as the six subnets of `simulation.paper_profile`. Each case runs a server in a process of its own,
and this process sends the requests. It sends each one when it is due, however late the answers are, and latencies count from
then. The SLO is 36 ms. Bursty traffic has CV^2 4, and a third of it is evenly spaced. Bursts are 3 s at 600 queries/s and 1 s
at 3,000, again and again, with CV^2 4. The parts:
- bounds: the cases that have bounds, and the same traffic at the peers, in a server without a network ("in process"), and in
  the simulator, where only the engines take time ("simulation").
- bursts: bursts with switching, and with each fixed subnet, here and at the first peer.
- rates: the highest rate at 0.99 attainment, on a grid with a step of 1.12.
A peer serves one fixed subnet, by the same sleeps. `--peer-batches` limits its batches.

A run counts if other programs used at most 0.15 cores, and if the generator was at most 1 ms late at p99. In process, it wakes
up once per millisecond, so 2 ms are allowed. Each case is repeated until --repeats runs count, at most --tries times. Cases
take turns, so that all servers meet the same conditions. With --json, results are saved after each run, and a later call with
the same options goes on from there. The exit status is 1 if an answer of the gateway was wrong or lost.
Library: gateway.Gateway, serving.server, simulation.traces, loadtest.loadgen.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from gateway_load import cases, child, peers, report, running
from gateway_load.cases import Case
from gateway_load.running import Run, Setup

from superserve_jax import cli, errors, files, progress

ENOUGH = 0.99
QUICK = {"seconds": 0.5, "bursts_s": 0.8}
Part = Literal["bounds", "bursts", "rates"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      parts: what to measure, see above.
      only: measure only cases whose names contain one of these texts, such as "HTTP json".
      peer: servers of other projects to measure as well.
      peer_python: the interpreter of an environment with the peers; by default the one that runs this program.
      peer_batches: the largest batch of the peers, for each of the six subnets.
      peer_wait_ms: how long the peers wait for a batch to be full.
      repeats: the number of runs that must count, of which the median is taken.
      tries: the most runs of a case.
      seconds: the length of bursty traffic.
      bursts_s: the length of the traffic with bursts.
      connections: the connections of HTTP to open; requests that are due wait if all are in use.
      grpc_connections: the connections of gRPC to open.
      seed: the seed of the arrivals of the first run; the next run has the next one.
      quick: only try it: one short run of each case, at low rates.
      json: save the results in this file, and go on from those that it has.
      plot: write a plot to this file.
    """

    parts: tuple[Part, ...] = ("bounds", "bursts", "rates")
    only: tuple[str, ...] = ()
    peer: tuple[Literal["mosec", "litserve", "ray"], ...] = ()
    peer_python: pathlib.Path = pathlib.Path(sys.executable)
    peer_batches: tuple[int, int, int, int, int, int] = (16, 16, 16, 16, 8, 8)
    peer_wait_ms: int = 1
    repeats: int = 3
    tries: int = 10
    seconds: float = 6.0
    bursts_s: float = 20.0
    connections: int = 512
    grpc_connections: int = 8
    seed: int = 0
    quick: bool = False
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "repeats", "seconds", "bursts_s", "connections", "grpc_connections", "peer_wait_ms")
        if self.tries < self.repeats:
            raise errors.ConfigError(f"tries must be at least repeats={self.repeats}, got {self.tries}")

    def setup(self) -> Setup:
        """How the cases are run."""
        chosen: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(Setup)}
        if self.quick:
            chosen |= QUICK
        return Setup(**chosen)


class Runs:
    """The runs of all cases so far.

    Args:
      options: the options. Results in the file of `options.json` must come from the same ones.
    """

    def __init__(self, options: Options):
        self.options, self.setup = options, options.setup()
        self.found: dict[str, list[Run]] = {}
        self._settings = json.loads(json.dumps(dataclasses.asdict(self.setup), default=str))
        if options.json is not None and options.json.exists():
            content = json.loads(options.json.read_text())
            if content.get("settings") != self._settings:
                raise errors.ConfigError(f"{options.json} has results of other options; name another file")
            self.found = content["runs"]

    def is_enough(self, case: Case, tries: int) -> bool:
        """Whether a case needs no further run, since enough count, or since it has `tries` runs."""
        runs = self.found.get(case.name, [])
        return len(runs) >= (1 if self.options.quick else tries) or sum(map(running.counts, runs)) >= self.options.repeats

    def add(self, case: Case) -> None:
        """Runs a case once more, and saves the results."""
        runs = self.found.setdefault(case.name, [])
        runs.append(running.run(slow(case) if self.options.quick else case, self.setup, len(runs)))
        for words in runs[-1].get("words", ()):
            print(f"{case.name}: {words}", flush=True)
        self.save()

    def results(self) -> dict[str, Run]:
        """The result of each case."""
        repeats = 1 if self.options.quick else self.options.repeats
        return {name: running.result(runs, repeats) for name, runs in self.found.items()}

    def save(self, **more: Any) -> None:
        """Writes the results to the file of --json, if there is one."""
        if self.options.json is not None:
            content = {"settings": self._settings, "runs": self.found, "results": self.results(), **more}
            files.write_json(self.options.json, content)


def slow(case: Case) -> Case:
    """The same case at a low rate."""
    return dataclasses.replace(case, qps=min(case.qps, 200.0))


def measure(runs: Runs, chosen: Sequence[Case], description: str, tries: int) -> None:
    """Runs cases in turns until each has enough runs that count, or `tries` runs."""
    missing = [case for case in chosen if not runs.is_enough(case, tries)]
    while missing:
        for case in progress.track(missing, description):
            runs.add(case)
        missing = [case for case in missing if not runs.is_enough(case, tries)]


def highest_rates(runs: Runs, rising: Mapping[tuple[str, str], Sequence[Case]]) -> dict[str, dict[str, float]]:
    """The highest rate of each server at which the attainment is at least 0.99; 0 if there is none. A search by halves.

    All servers take turns. A disturbance of the machine meets them all, so each case has `repeats` runs, and no more.
    """
    known = {key: (-1, len(each)) for key, each in rising.items()}  # enough at the first place, and not at the second
    while todo := {key: rising[key][(low + high) // 2] for key, (low, high) in known.items() if high - low > 1}:
        measure(runs, list(todo.values()), "rates", runs.options.repeats)
        results = runs.results()
        for key, case in todo.items():
            low, high = known[key]
            middle = (low + high) // 2
            known[key] = (middle, high) if results[case.name]["attainment"] >= ENOUGH else (low, middle)
    rates: dict[str, dict[str, float]] = {}
    for (server, which), (low, _) in known.items():
        rates.setdefault(server, {})[which] = rising[server, which][low].qps if low >= 0 else 0.0
    return rates


def selected(found: Iterable[Case], only: Sequence[str], *, grpc: bool) -> list[Case]:
    """The cases to run: those that --only names, each once, and without gRPC if the gateway has none."""
    unique = dict.fromkeys(case for case in found if grpc or case.server != "gRPC")
    return [case for case in unique if not only or any(text in case.name for text in only)]


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    versions = {name: peers.version(name, options.peer_python) for name in options.peer}
    grpc = child.has_grpc()
    runs, parts = Runs(options), dict.fromkeys(options.parts)
    print(", ".join(f"{name} {version}" for name, version in versions.items()) or "no peers: see --peer", flush=True)
    tables = {"bounds": cases.of_bounds(options.peer), "bursts": cases.of_bursts(options.peer)}
    chosen = selected((case for part in parts for case in tables.get(part, ())), options.only, grpc=grpc)
    measure(runs, chosen, "cases", options.tries)
    rates: dict[str, dict[str, float]] = {}
    if "rates" in parts:
        grid = cases.of_rates(options.peer, grpc=grpc)
        wanted = {key: selected(each[:1] if options.quick else each, options.only, grpc=grpc) for key, each in grid.items()}
        rates = highest_rates(runs, {key: each for key, each in wanted.items() if each})
    results = runs.results()
    report.print_cases(results)
    if "bounds" in parts:
        report.print_bounds(results)
    if rates:
        report.print_rates(rates)
    print(f"\n{report.summary(results, [*results])}")
    if options.plot is not None:
        report.draw(options.plot, results, rates)
        print(f"plot: {options.plot}")
    runs.save(rates=rates, versions=versions)
    if options.json is not None:
        print(f"results: {options.json}")
    faults = [name for name, r in results.items() if name.startswith(cases.OWN) and r["wrong"] + r["lost"]]
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    cli.run(main)
