"""Searches a trained run for Pareto-optimal subnets and chooses the subnets to serve.

    superserve search runs/digits_resnet --candidates 1000
    superserve search runs/digits_resnet --candidates 1000 --served 500 --tolerance 0.02
    superserve search runs/digits_resnet --cost latency --latency-batch 16

Writes search.json and search.png into the run's folder. Go on with `superserve calibrate`. Ctrl-C keeps the candidates in
search.jsonl; the same command goes on from there. The defaults come from the run's config: see `superserve search RUN --help`.

With --under, it searches for the most accurate subnet under constraints, which hold together:

    superserve search runs/digits_resnet --under latency=5ms size=20MB flops=1G
    superserve search runs/digits_resnet --under latency=5ms --latency-table h100.json --serve

A predictor learns from evaluated subnets, and its error on held-out subnets is printed. The best subnets are evaluated on
validation examples. Writes constrained.json. --serve also adds the best subnet to the served ones.

Library: training.stages.search (training.search, training.latency, training.calibration, training.evaluation) and
training.constrained.search_under (training.constraints, training.predictor, training.evolution, training.latency_table).
"""

import dataclasses
import pathlib
import time
from typing import Annotated

import tyro

from superserve_jax import cli, errors
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.training import constrained, stages
from superserve_jax.training.config import SearchConfig
from superserve_jax.training.constrained import Settings
from superserve_jax.training.constrained_report import Report, Winner
from superserve_jax.training.constraints import Constraints
from superserve_jax.training.latency_table import LatencyTable
from superserve_jax.training.runs import Run

_PARETO_ONLY = ("candidates", "cost", "served", "tolerance")  # fields of SearchConfig
_UNDER_ONLY = ("samples", "predictions", "winners", "dtype", "latency_table", "serve")  # fields of Options


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      search: the settings of the search.
      under: search under constraints, such as latency=5ms size=20MB flops=1G. One, two or three of them. FLOPs are the
        multiply-adds of one input; latency is that of a batch of --latency-batch.
      samples: with --under, number of evaluated subnets that the predictor learns from.
      predictions: with --under, number of subnets that the search compares by predictions.
      winners: with --under, number of the best subnets that are evaluated.
      dtype: with --under, the dtype that subnets compute in, for their size.
      latency_table: with --under latency=..., a table that the same command wrote on another device, for batches of
        --latency-batch.
      serve: with --under, add the best subnet to the subnets that the run serves.
      json: write the chosen subnets, or the report of --under, to this file.
    """

    search: Annotated[SearchConfig, tyro.conf.arg(name="")]
    under: tuple[str, ...] = ()
    samples: int = Settings.samples
    predictions: int = Settings.predictions
    winners: int = Settings.winners
    dtype: ComputeDtype = Settings.dtype
    latency_table: pathlib.Path | None = None
    serve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    workdir, options = cli.options_after_path(lambda path: Options(Run.open(path).config.search), __doc__)
    run = Run.open(workdir)
    default = run.config.search
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, search=options.search))
    cli.refuse_without(options, "under", *_UNDER_ONLY)
    constraints = Constraints.parse(options.under) if options.under else None
    _refuse_unused(options, default, constraints)
    if constraints:
        _search_under(run, options, constraints)
    else:
        _search(run, options)


def _refuse_unused(options: Options, default: SearchConfig, constraints: Constraints | None) -> None:
    """Raises ConfigError for an option that differs from the run's config and has no effect."""
    given = {name: value for name, value in vars(options.search).items() if value != getattr(default, name)}
    if constraints is None:
        if "latency_batch" in given and options.search.cost != "latency":
            raise errors.ConfigError(
                f"--latency-batch {given['latency_batch']} has no effect without --cost latency; give both or neither"
            )
        return
    for name in _PARETO_ONLY:
        if name in given:
            raise errors.ConfigError(f"--{name} {given[name]} has no effect with --under; leave out one of them")
    of_latency = {"latency-batch": given.get("latency_batch"), "latency-table": options.latency_table}
    for name, value in of_latency.items():
        if value is not None and constraints.latency_ms is None:
            raise errors.ConfigError(
                f"--{name} {value} has no effect without a limit of the latency, such as --under latency=5ms; give both or "
                "neither"
            )


def _search(run: Run, options: Options) -> None:
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


def _search_under(run: Run, options: Options, constraints: Constraints) -> None:
    start = time.monotonic()
    report = constrained.search_under(
        run,
        constraints,
        Settings(options.samples, options.predictions, options.winners, options.dtype),
        table=LatencyTable.read(options.latency_table) if options.latency_table else None,
    )
    _print(report, time.monotonic() - start)
    cli.write_results(options.json, report.to_json())
    if options.serve and not report.is_within(report.best):
        raise errors.ConfigError(
            f"--serve: all subnets that were timed are above the limit of {report.constraints.latency_ms:g} ms; the fastest "
            f"one takes {report.best.measured_ms:.3g} ms. Nothing is served; allow more, or limit the flops, too"
        )
    if options.serve:
        constrained.serve(run, report.best.subnet)
        print(f"the best subnet is now among those to serve; go on with `{cli.command('calibrate', run.workdir)}`")


def _print(report: Report, seconds: float) -> None:
    """Prints what was found, how good the predictions are, and the table of the evaluated subnets."""
    if report.rmse is None or report.kendall_tau is None:
        print(f"under {report.constraints}: all networks of the search space, {report.samples} subnets, in {seconds:.0f} s")
    else:
        evolved, drawn = report.predictions
        print(f"under {report.constraints}: {evolved} subnets by evolution and {drawn} random ones in {seconds:.0f} s")
        print(
            f"accuracy predictor, held-out subnets of {report.samples}: RMSE {100 * report.rmse:.2f} points, "
            f"Kendall tau {report.kendall_tau:.3f}"
        )
    if report.latency:
        print(
            f"latency table of '{report.latency['device']}', batch {report.latency['batch']}: mean error of a prediction, "
            f"cross-validated: {100 * report.latency['error']:.1f} %"
        )
    measured = any(w.measured_ms is not None for w in report.rows)
    columns = {
        "found by": lambda w: w.found_by,
        "subnet": lambda w: f"{w.subnet!r}",
        **({"predicted ms": lambda w: f"{w.costs.latency_ms:.3f}"} if report.latency else {}),
        **({"measured ms": lambda w: f"{w.measured_ms:.3f}"} if measured else {}),
        "MB": lambda w: f"{w.costs.size_bytes / 1e6:.3f}",
        "MFLOPs": lambda w: f"{w.costs.flops / 1e6:.2f}",
        **({"predicted": lambda w: f"{100 * w.predicted:.2f} %"} if report.rmse is not None else {}),
        "validation accuracy": lambda w: f"{100 * w.accuracy:.2f} %",
    }
    cli.print_columns(columns, report.rows, left=2)
    print(f"standard error of an accuracy: {100 * report.standard_error:.2f} points")
    if report.best_evaluated:
        print(f"best of evolution, {_difference(report.winners[0], report.best_evaluated)} the best subnet of the samples")
    if report.control:
        print(f"best of evolution, {_difference(report.winners[0], report.control[0])} the best of the random search")
    print(f"chosen, by {report.best.found_by}: {report.best.subnet!r}")
    limit = report.constraints.latency_ms
    if limit is not None and report.best.measured_ms is not None and report.best.measured_ms > limit:
        print(f"every subnet measured above {limit:g} ms: give a lower limit, or measure on an idle machine")


def _difference(one: Winner, other: Winner) -> str:
    points = 100 * (one.accuracy - other.accuracy)
    return f"{abs(points):.2f} points {'below' if points < 0 else 'above'}"
