"""Makes a run out of weights that others published, as if it had been trained here.

    python train/convert.py configs/ofa_resnet50.py ofa_resnet50.pth --workdir runs/ofa_resnet50

The config says which network the weights are for and which data it is judged on. The run has a checkpoint of step 0 with the
weights and the statistics that came with them; train/search.py, calibrate.py, evaluate.py and export.py go on from there, and
so does train/supernet.py with the same config, which trains the weights further. A .pth file needs
`pip install 'superserve-jax[convert]'`. Library: convert.weights, training.runs.Run.convert.
"""

import dataclasses
import pathlib
import sys
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
      config: every field of the config file can be overridden.
      workdir: the run's folder; runs/NAME if left out.
      json: write a description to this file.
    """

    weights: Annotated[pathlib.Path, tyro.conf.Positional]
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    workdir: pathlib.Path | None = None
    json: pathlib.Path | None = None


def main() -> None:
    """The program."""
    config_path, rest = cli.config_argument(sys.argv[1:], __doc__)
    default = Options(tyro.MISSING, load_config(config_path))
    options = tyro.cli(Options, default=default, args=rest, prog=f"train/convert.py {config_path}")
    model = convert.weights(options.weights, options.config.model)  # first, since unfit weights should leave no folder behind
    run = Run.convert(options.config, options.workdir or pathlib.Path("runs") / options.config.name, model)
    largest = model.space.largest()
    flops, params = model.config.flops(largest), model.config.num_params(largest)
    if options.json:
        files.write_json(
            options.json, {"run": str(run.workdir), "params": params, "flops": flops, "subnets": model.space.size}
        )
    print(
        f"{run.workdir}: {params / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOPs, {model.space.size:.2g} subnets; go on "
        f"with `python train/search.py {run.workdir}`"
    )


if __name__ == "__main__":
    cli.run(main)
