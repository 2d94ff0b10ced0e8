"""Measures the memory of SubnetNorm at a network's full size: bytes of all statistics against bytes of the shared weights.

    python train/bench/norm_statistics.py configs/ofa_resnet50.py --subnets 500

Builds the network with random weights, exports it with statistics for every subnet, loads the export and runs a few subnets
at batch 1. The statistics are not calibrated: their sizes are realistic, but the logits mean nothing.
Library: training.random_export.export, exports.load, training.latency.measure.
"""

import dataclasses
import pathlib
import tempfile
import time
from typing import Annotated

import numpy as np
import tyro

from superserve_jax import cli, exports, files
from superserve_jax.training import latency, random_export
from superserve_jax.training.config import TrainConfig, load_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      config: the experiment; only its network is used.
      subnets: number of subnets with statistics: the smallest, the largest and random ones.
      run: number of subnets to run.
      json: write the result to this file.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    subnets: int = 500
    run: int = 3
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    _, options = cli.options_after_path(lambda path: Options(load_config(path)), __doc__)
    config = options.config.model
    with tempfile.TemporaryDirectory() as folder:
        path = random_export.export(config, pathlib.Path(folder) / "export", subnets=options.subnets)
        start = time.monotonic()
        loaded = exports.load(path)
        load_s = time.monotonic() - start
        kinds = {"statistics.npz": 0, "weights": 0}
        for name, file in loaded.manifest["files"].items():
            kinds[name.split("/")[0]] += file["bytes"]
    weights, sizes = sum(p.nbytes for p in loaded.params.values()), [s.nbytes for s in loaded.statistics.values()]
    ordered = loaded.subnets
    shown = [ordered[i] for i in np.linspace(0, len(ordered) - 1, options.run).round().astype(int)]
    table = [("MFLOPs", "params", "bytes of statistics", "weights / statistics", "ms per input")]
    for subnet, ms in latency.measure(loaded, shown, batch=1, repeats=5).items():
        flops, params, size = config.flops(subnet), config.num_params(subnet), loaded.statistics[subnet].nbytes
        table.append((f"{flops / 1e6:.0f}", f"{params:,}", f"{size:,}", f"{weights / size:.0f}", f"{ms:.0f}"))
    cli.print_table(table)
    mean = sum(sizes) / len(sizes)
    print(
        f"{len(sizes)} subnets (not calibrated, of realistic sizes): {sum(sizes):,} bytes of statistics, {mean:,.0f} each, "
        f"{weights / mean:.0f} times less than the {weights:,} bytes of weights\n"
        f"on disk: {kinds['statistics.npz']:,} bytes of statistics and subnets' names, and {kinds['weights']:,} of weights; "
        f"loaded and checked in {load_s:.1f} s"
    )
    if options.json:
        files.write_json(
            options.json,
            {
                "subnets": len(sizes),
                "weights_bytes": weights,
                "statistics_bytes": sizes,
                "disk_bytes": kinds,
                "load_s": load_s,
            },
        )


if __name__ == "__main__":
    cli.run(main)
