"""Searches a trained run for Pareto-optimal subnets and chooses those to serve.

    python train/search.py runs/digits_resnet --candidates 1000
    python train/search.py runs/digits_resnet --candidates 1000 --served 500 --tolerance 0.02
    python train/search.py runs/digits_resnet --cost latency --latency-batch 16

Leaves search.json and search.png in the run's folder; calibrate, evaluate and export come next. Ctrl-C keeps what was tried
(search.jsonl); the same command goes on from there. What is not given is as in the run's config; --help after the folder lists
it. Library: training.stages.search (training.search, training.latency, training.calibration, training.evaluation).
"""

import dataclasses
import pathlib
import sys
import time
from typing import Annotated

import tyro

from superserve_jax import cli, files
from superserve_jax.training import stages
from superserve_jax.training.config import SearchConfig
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      search: every field can be overridden.
      json: write the chosen subnets to this file.
    """

    search: Annotated[SearchConfig, tyro.conf.arg(name="")]
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    run = Run.open(sys.argv[1])
    options = tyro.cli(Options, default=Options(run.config.search), args=sys.argv[2:], prog=f"train/search.py {sys.argv[1]}")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, search=options.search))
    start = time.monotonic()
    chosen = stages.search(run)
    seconds = time.monotonic() - start
    found, flops = run.read("search.json", made_by="train/search.py"), run.config.model.flops
    latency = options.search.cost == "latency"
    cli.print_table(
        [
            ("MFLOPs", *(["ms"] if latency else []), "validation accuracy"),
            *(
                (f"{flops(c.subnet) / 1e6:.2f}", *([f"{c.cost:.3f}"] if latency else []), f"{100 * c.accuracy:.2f} %")
                for c in chosen
            ),
        ]
    )
    if options.json:
        files.write_json(options.json, [c.to_json() for c in chosen])
    print(
        f"{len(found['candidates'])} candidates in {seconds:.0f} s, {len(chosen)} chosen; standard error of an accuracy: "
        f"{100 * found['standard_error']:.2f} points"
    )
    if latency:
        print(f"latencies are predicted; mean error, cross-validated: {100 * found['latency_error']:.1f} %")
    print(f"plot: {run.workdir / 'search.png'}; go on with `python train/calibrate.py {run.workdir}`")


if __name__ == "__main__":
    cli.run(main)
