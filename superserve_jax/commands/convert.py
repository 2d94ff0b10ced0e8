"""Makes a run from published weights, so that search, calibration, evaluation and export work as after training.

    superserve convert my-classifier --workdir runs/reviews
    superserve convert ofa_resnet50 ofa_resnet50.pth --workdir runs/ofa_resnet50

A **directory** that Hugging Face's `save_pretrained` wrote needs no config. A BERT sequence classifier becomes a DynaBERT. A
ViT, DeiT or DINOv2 that classifies images becomes a ViT. Sizes, class names, and how inputs are made come from the directory.
The run gets an export at once, which serves the classifier as it is, with unknown accuracy. With labelled texts or images it
also serves smaller subnets, and their accuracies are measured:

    superserve convert my-classifier --texts reviews.csv --workdir runs/reviews-subnets
    superserve convert my-vit --images pets --workdir runs/pets-subnets

Heads and neurons are then sorted by importance, and a search chooses the subnets. Nothing is trained. `superserve train RUN`
trains the run further. docs/convert.md lists what is supported. `superserve convert DIRECTORY --help` lists the options.

A **config** says which network other weights belong to, and on which data it is evaluated. Go on with `superserve search`,
calibrate, evaluate and export. Or train the weights further, with `superserve train` and the same config.

The run has a checkpoint of step 0 with the weights and their statistics. Weights of PyTorch (.bin, .pth, .pt) need
`pip install 'superserve-jax[convert]'`. For .safetensors, `pip install safetensors` is enough.
Library: convert.from_pretrained, convert.weights, training.runs.Run.convert.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import tyro

from superserve_jax import cli, convert, errors
from superserve_jax.commands import convert_data
from superserve_jax.commands.convert_data import DirectoryOptions
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.vit import ViTConfig
from superserve_jax.training import runs, stages
from superserve_jax.training.config import (
    DistillConfig,
    OptimConfig,
    Phase,
    SearchConfig,
    TrainConfig,
    config_to_json,
    load_config,
)
from superserve_jax.training.runs import Run

_STEPS = {"epochs": 6, "batch_size": 32, "random_subnets": 2}
RECIPES: dict[str, dict[str, Any]] = {
    # The published recipe of DynaBERT, as in configs/dynabert_sst2.py.
    DynaBERTConfig.family: {
        "optim": OptimConfig(name="adamw", lr=2e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
        "phases": (Phase(elastic=("heads", "ffn"), rewire=True), Phase()),
        "distill": DistillConfig(hidden=0.1),
        **_STEPS,
    },
    # The same for a ViT, with a usual rate of fine-tuning.
    ViTConfig.family: {
        "optim": OptimConfig(name="adamw", lr=5e-5, schedule="cosine", warmup=0.1, weight_decay=0.05, clip_norm=1.0),
        "phases": (Phase(elastic=("heads", "expand"), rewire=True), Phase()),
        "distill": DistillConfig(hidden=0.1),
        **_STEPS,
    },
}
"""How a converted classifier is trained further, by family."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options for a config.

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
    path, options = cli.options_after_path(_defaults, __doc__)
    if isinstance(options, DirectoryOptions):
        convert_directory(pathlib.Path(path), options)
    else:
        convert_weights(options)


def convert_weights(options: Options) -> None:
    """Makes a run from a config and a weight file."""
    model = convert.weights(options.weights, options.config.model)  # before the run: unfit weights leave no folder behind
    run = Run.convert(options.config, options.workdir or pathlib.Path("runs") / options.config.name, model)
    print(f"{report(run, options.json)}; go on with `{cli.command('search', run.workdir)}`")


def convert_directory(path: pathlib.Path, options: DirectoryOptions) -> None:
    """Makes a run and an export from a directory that `save_pretrained` wrote."""
    cli.refuse_without(options, "texts", "text", "second", "label")
    if options.images is None:
        cli.refuse_without(options, "texts", "candidates", "examples")
    names = ("max_length", "image_size", "depths", "heads", "ffn")
    found = convert.from_pretrained(path, **{name: getattr(options, name) for name in names})
    workdir = runs.check_workdir(options.workdir or pathlib.Path("runs") / path.resolve().name)
    config = TrainConfig(
        name=path.resolve().name,
        model=found.config,
        data=convert_data.config_of(found, options, workdir),
        search=SearchConfig(candidates=options.candidates, examples=options.examples),
        **RECIPES[found.config.family],
    )
    runs.check_unused(config, workdir)  # before data is read and units are sorted, which can take minutes
    model = found.model
    if config.data is not None:
        found, dataset = convert_data.open(found, config)
        print("sorting heads and neurons by importance")
        model = stages.sorted_by_importance(found.model, dataset, seed=config.seed)
        convert_data.keep_vocabulary(found, workdir)
    run = Run.convert(config, workdir, model)
    print(report(run, options.json))
    print(f"classes: {', '.join(found.class_names)}\n{convert_data.describe(found)}")
    if config.data is not None:
        stages.search(run)
        stages.calibrate(run)
        served = stages.evaluate(run)
        cli.print_table(stages.table(served))
        print(f"{stages.precision(run, served)}; the last row is the original classifier")  # a search keeps the largest subnet
        export = stages.export(run)
        print(f"export: {export} serves these subnets")
    else:
        export = found.export(run.workdir / "export", training=config_to_json(config))
        kind, option = ("texts", "--texts FILE") if isinstance(found.config, DynaBERTConfig) else ("images", "--images FOLDER")
        print(
            f"export: {export} serves the classifier as it is. Its accuracy is unknown. Smaller subnets are not served, "
            f"because nobody can tell how well they answer without labelled {kind} ({option})"
        )
    print(f"go on with `{cli.command('measure', export)}`")


def report(run: Run, json: pathlib.Path | None) -> str:
    """A description of a converted run in one line. It is also written to a JSON file, if one is given."""
    model, space = run.config.model, run.config.model.space()
    flops, params, subnets = model.flops(space.largest()), model.num_params(space.largest()), space.size
    cli.write_results(json, {"run": str(run.workdir), "params": params, "flops": flops, "subnets": subnets})
    return f"{run.workdir}: {params / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOPs, {subnets:.2g} subnets"


def _defaults(path: str) -> Options | DirectoryOptions:
    if pathlib.Path(path).is_dir():
        return DirectoryOptions()
    try:
        return Options(tyro.MISSING, load_config(path))
    except errors.ConfigError as e:
        if pathlib.Path(path).exists() or path.endswith(".py"):
            raise
        raise errors.ConversionError(f"there is no directory {path} of save_pretrained, and no such config: {e}") from e
