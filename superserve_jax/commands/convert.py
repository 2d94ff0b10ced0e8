"""Makes a run from published weights, so that search, calibration, evaluation and export work as after training.

    superserve convert configs/ofa_resnet50.py ofa_resnet50.pth --workdir runs/ofa_resnet50

The config says which network the weights belong to and on which data it is evaluated. The run has a checkpoint of step 0 with
the weights and their statistics. Go on with `superserve search`, calibrate, evaluate and export. Or train the weights
further, with `superserve train` and the same config. A .pth file needs `pip install 'superserve-jax[convert]'`.
Library: convert.weights, training.runs.Run.convert.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from superserve_jax import cli, convert, files
from superserve_jax.training.config import TrainConfig, load_config
from superserve_jax.training.runs import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      weights: the weight file: .npz, .safetensors, .pth, .pt or .bin.
      config: the experiment; an option can override every field of the config file.
      workdir: the run's folder; runs/NAME if left out.
      json: write a description to this file.
    """

    weights: Annotated[pathlib.Path, tyro.conf.Positional]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    workdir: pathlib.Path | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The command."""
    _, options = cli.options_after_path(lambda path: Options(tyro.MISSING, load_config(path)), __doc__)
    model = convert.weights(options.weights, options.config.model)  # before the run: unfit weights leave no folder behind
    run = Run.convert(options.config, options.workdir or pathlib.Path("runs") / options.config.name, model)
    largest = model.space.largest()
    flops, params = model.config.flops(largest), model.config.num_params(largest)
    if options.json:
        files.write_json(
            options.json, {"run": str(run.workdir), "params": params, "flops": flops, "subnets": model.space.size}
        )
    print(
        f"{run.workdir}: {params / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOPs, {model.space.size:.2g} subnets; go on "
        f"with `superserve search {run.workdir}`"
    )
