"""Measures two exports behind one gateway: each alone, and both at the same time.

    pip install 'superserve-jax[serve]'
    python serve/bench/two_models.py digits digits --json runs/two_models.json

It takes directories of exports, names of exports in the package, and config files. For a config file, it makes an export with
random weights. There, the "accuracy" of a subnet is its FLOPs / the FLOPs of the largest one.

Each model has a server of its own. Its profile was measured while it had the device to itself, and its policy does not know of
the other model. Each model gets bursty traffic: CV^2 4, a third of it evenly spaced, at `--share` times the throughput of its
smallest subnet. The first model is measured alone, then the second one, then both at once with the same arrivals. The table
shows medians. The load generator is a process of its own on the same machine. So choose models whose batches take
milliseconds.
Library: gateway.Gateway, serving.server, simulation.traces.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from gateway_load import cases, children, http1, messages, open_loop, report
from gateway_load.children import CpuTimes

from superserve_jax import cli, files, progress
from superserve_jax.simulation import traces
from superserve_jax.training import random_export

TOGETHER = "both at once"
SHOWN = ("SLO attainment", "accuracy", "p50 ms", "p99 ms", "generator late, p99 ms", "other programs, cores")
FIGURES = ("attainment", "accuracy", "p50_ms", "p99_ms", "lateness_p99_ms", "other_cores")
_START_S, _PATIENCE_S = 1800.0, 10.0  # the child may compile for minutes


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      first: an export's directory, the name of an export in the package, or a config file. Its inputs have one shape.
      second: the same for the other model; it may be the same one.
      subnets: the number of served subnets, for a config file.
      share: the mean rate of each model / the throughput of its smallest subnet.
      slo_ms: latency objective.
      seconds: the length of the traffic.
      repeats: the number of runs of which the median is taken.
      connections: connections to open for each model.
      seed: the seed of the arrivals of the first run; the next run has the next one.
      json: save the results in this file.
    """

    first: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("digits")
    second: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("digits")
    subnets: int = 6
    share: float = 0.1
    slo_ms: float = 36.0
    seconds: float = 10.0
    repeats: int = 3
    connections: int = 256
    seed: int = 0
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "subnets", "share", "slo_ms", "seconds", "repeats", "connections")


@dataclasses.dataclass(frozen=True)
class Model:
    """A served model, as the gateway describes it.

    Args:
      name: its name.
      input: its input.
      qps: the throughput of its smallest subnet, in queries/s.
    """

    name: str
    input: messages.Input
    qps: float


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    with (
        random_export.export_of(options.first, subnets=options.subnets) as first,
        random_export.export_of(options.second, subnets=options.subnets) as second,
        children.started("child_exports.py", first, second, "--slo-ms", options.slo_ms, start_s=_START_S) as child,
    ):
        found = child.printed()
        models = [Model(name, messages.Input(tuple(m["shape"]), m["dtype"]), m["qps"]) for name, m in found["models"].items()]
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in progress.track(range(options.repeats), "runs"):
            due_s = [arrivals(model, options, options.seed + 2 * number + i) for i, model in enumerate(models)]
            for i, model in enumerate(models):
                [alone] = play(child, found["port"], [model], [due_s[i]], options)
                runs.setdefault(f"{model.name}, alone", []).append(alone)
            for model, together in zip(models, play(child, found["port"], models, due_s, options), strict=True):
                runs.setdefault(f"{model.name}, {TOGETHER}", []).append(together)
    results = {name: {f: statistics.median(run[f] for run in each) for f in FIGURES} for name, each in runs.items()}
    faults = sum(run["wrong"] + run["lost"] for each in runs.values() for run in each)
    rates = ", ".join(f"{model.name} {options.share * model.qps:,.0f}/s" for model in models)
    print(f"Medians of {options.repeats} runs, SLO {options.slo_ms:g} ms. Mean rates: {rates}.")
    columns = {"model": lambda r: r["name"], **{name: report.COLUMNS[name] for name in SHOWN}}
    cli.print_columns(columns, ({"name": name, **found} for name, found in results.items()))
    print(f"wrong or lost answers: {faults}")
    if options.json is not None:
        files.write_json(
            options.json, {"options": json.loads(json.dumps(dataclasses.asdict(options), default=str)), "runs": runs}
        )
    sys.exit(1 if faults else 0)


def arrivals(model: Model, options: Options, seed: int) -> np.ndarray:
    """When the requests of a model are due, in seconds."""
    qps = options.share * model.qps
    trace = traces.bursty(
        base_qps=qps / 3, burst_qps=2 * qps / 3, cv2=cases.CV2, duration_s=options.seconds, slo_ms=options.slo_ms, seed=seed
    )
    return trace.arrivals_s


def play(
    child: children.Child, port: int, models: Sequence[Model], due_s: Sequence[np.ndarray], options: Options
) -> list[dict[str, Any]]:
    """Plays the traffic of some models at the same time. Returns the figures of each."""
    made = [
        [
            messages.binary_request(m.input, i, options.slo_ms, path=f"/v2/models/{m.name}/infer")
            for i in range(messages.NUMBERS)
        ]
        for m in models
    ]
    all_due_s = np.concatenate(due_s)
    order = np.argsort(all_due_s, kind="stable")
    owner = np.repeat(np.arange(len(models)), [len(due) for due in due_s])[order]
    place = np.concatenate([np.arange(len(due)) for due in due_s])[order]
    requests = [made[o][p % messages.NUMBERS] for o, p in zip(owner.tolist(), place.tolist(), strict=True)]
    connect = functools.partial(http1.Http1, port, connections=options.connections * len(models))
    before = list[CpuTimes]()
    played = open_loop.play(
        connect,
        all_due_s[order],
        requests,
        patience_s=_PATIENCE_S,
        on_start=lambda: before.append(CpuTimes.now(child)),
    )
    used = CpuTimes.now(child).since(before[0], len(order))
    return [
        open_loop.figures(played.of(owner == i), options.slo_ms, messages.read_any, messages.NUMBERS)
        | {"other_cores": used["other_cores"]}
        for i in range(len(models))
    ]


if __name__ == "__main__":
    cli.run(main)
