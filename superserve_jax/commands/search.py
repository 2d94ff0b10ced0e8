"""Searches a trained run for Pareto-optimal subnets and chooses the subnets to serve.

    superserve search runs/digits_resnet --candidates 1000
    superserve search runs/digits_resnet --candidates 1000 --served 500 --tolerance 0.02
    superserve search runs/digits_resnet --cost latency --latency-batch 16

Writes search.json and search.png into the run's folder. Go on with `superserve calibrate`. Ctrl-C keeps the candidates in
search.jsonl; the same command goes on from there. The defaults come from the run's config: see `superserve search RUN --help`.
Library: training.stages.search (training.search, training.latency, training.calibration, training.evaluation).
"""

import dataclasses
import pathlib
import time
from typing import Annotated

import tyro

from superserve_jax import cli
from superserve_jax.training import stages
from superserve_jax.training.config import SearchConfig
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      search: the settings of the search.
      json: write the chosen subnets to this file.
    """

    search: Annotated[SearchConfig, tyro.conf.arg(name="")]
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    workdir, options = cli.options_after_path(lambda path: Options(Run.open(path).config.search), __doc__)
    run = Run.open(workdir)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, search=options.search))
    start = time.monotonic()
    chosen = stages.search(run)
    seconds = time.monotonic() - start
    found, flops = run.read("search.json", made_by="superserve search"), run.config.model.flops
    latency = options.search.cost == "latency"
    columns = {
        "MFLOPs": lambda c: f"{flops(c.subnet) / 1e6:.2f}",
        **({"ms": lambda c: f"{c.cost:.3f}"} if latency else {}),
        "validation accuracy": lambda c: f"{100 * c.accuracy:.2f} %",
    }
    cli.print_columns(columns, chosen)
    cli.write_results(options.json, [c.to_json() for c in chosen])
    print(
        f"{len(found['candidates'])} candidates in {seconds:.0f} s, {len(chosen)} chosen; standard error of an accuracy: "
        f"{100 * found['standard_error']:.2f} points"
    )
    if latency:
        print(f"latencies are predicted; mean error, cross-validated: {100 * found['latency_error']:.1f} %")
    print(f"plot: {run.workdir / 'search.png'}; go on with `{cli.command('calibrate', run.workdir)}`")
