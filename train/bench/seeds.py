"""Trains one config with several seeds, and prints the mean and the spread of the subnets' test accuracies.

    python train/bench/seeds.py configs/digits_resnet.py --seeds 0 1 2
    python train/bench/seeds.py --runs runs/demo runs/digits_resnet-seed1 runs/digits_resnet-seed2

A run's seed decides its weights, the order of the examples and the random subnets; the data stays the same. All runs are
compared at the same subnets: those that the search of the first run chose on validation data. Every subnet gets its own
statistics in every run, and is tested on the whole test split. Finished trainings are read, not repeated, so the same command
goes on after Ctrl-C. The spread is the standard deviation over the runs. For texts, the two baselines are printed below.
Library: training.loop.train, training.stages, training.calibration, training.evaluation.
"""

import dataclasses
import pathlib
import statistics
from typing import Annotated

import tyro

import superserve_jax as ss
from superserve_jax import cli, progress
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import calibration, evaluation, stages
from superserve_jax.training.config import load_config
from superserve_jax.training.runs import Run

EVAL_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: the config to train; left out with --runs.
      seeds: the seeds. The run of seed N is in the folder NAME-seedN.
      workdir: the folder of the runs.
      runs: runs that are trained already, to compare instead.
      most: the largest number of subnets in the table.
      json: write the results to this file.
    """

    config: Annotated[pathlib.Path | None, tyro.conf.Positional] = None
    seeds: tuple[int, ...] = (0, 1, 2)
    workdir: pathlib.Path = pathlib.Path("runs")
    runs: tuple[pathlib.Path, ...] = ()
    most: int = 8
    json: pathlib.Path | None = None

    def __post_init__(self):
        if bool(self.config) == bool(self.runs):
            raise ss.ConfigError("give either a config to train or --runs, the folders of trained runs")
        if self.most < 2:
            raise ss.ConfigError(f"most must be at least 2, the smallest and the largest subnet, got {self.most}")
        if len(self.runs or self.seeds) < 2:
            raise ss.ConfigError(f"a spread needs at least two runs, got {len(self.runs or self.seeds)}")


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    runs = [Run.open(path) for path in options.runs] or train(options)
    if not (runs[0].workdir / "search.json").exists():
        stages.search(runs[0])
    subnets = spaced(runs[0].served(), options.most)
    accuracies = [test(run, subnets) for run in runs]  # [runs][subnets]
    flops = [runs[0].config.model.flops(subnet) for subnet in subnets]
    results = [
        {"flops": cost, "accuracies": list(own), "mean": statistics.mean(own), "spread": statistics.stdev(own)}
        for cost, own in zip(flops, zip(*accuracies, strict=True), strict=True)
    ]
    lines = [("MFLOPs", *(run.workdir.name for run in runs), "mean", "spread")]
    for r in results:
        each = (f"{100 * accuracy:.2f} %" for accuracy in r["accuracies"])
        lines.append((f"{r['flops'] / 1e6:.2f}", *each, f"{100 * r['mean']:.2f} %", f"{100 * r['spread']:.2f}"))
    cli.print_table(lines)
    for name, accuracy in stages.baselines(runs[0]).items():
        print(f"to compare: {name}, {100 * accuracy:.2f} %")
    cli.write_results(options.json, {"runs": [str(run.workdir) for run in runs], "subnets": results})


def train(options: Options) -> list[Run]:
    """Trains the config with each seed, one after the other."""
    assert options.config is not None
    config = load_config(options.config)
    return [
        ss.train(dataclasses.replace(config, seed=seed), options.workdir / f"{config.name}-seed{seed}")
        for seed in options.seeds
    ]


def spaced(subnets: list[Subnet], most: int) -> list[Subnet]:
    """At most `most` of the subnets, at equal distances in their order; the first and the last are among them."""
    if len(subnets) <= most:
        return subnets
    return [subnets[round(i * (len(subnets) - 1) / (most - 1))] for i in range(most)]


def test(run: Run, subnets: list[Subnet]) -> list[float]:
    """Accuracies of subnets in a run on the whole test split, each with its own statistics."""
    model, dataset = run.model(), run.dataset()
    images, _ = dataset.arrays("train", limit=run.config.calibration_examples)
    calibrated = calibration.calibrate(model, progress.track(subnets, f"{run.workdir.name}, calibration"), images)
    own = SuperNet(model.config, model.params, calibrated)
    tested = progress.track(subnets, f"{run.workdir.name}, test examples")
    return evaluation.accuracy(own, tested, lambda: dataset.eval("test", EVAL_BATCH))


if __name__ == "__main__":
    cli.run(main)
