"""Makes a run from published weights, so that search, calibration, evaluation and export work as after training.

    superserve convert my-classifier --workdir runs/reviews
    superserve convert ofa_resnet50 ofa_resnet50.pth --workdir runs/ofa_resnet50

A **directory** that Hugging Face's `save_pretrained` wrote needs no config. A BERT sequence classifier becomes a DynaBERT: its
sizes, class names, vocabulary and case come from the directory. The run gets an export at once, which serves the classifier
as it is, with unknown accuracy. With labelled texts it also serves smaller subnets, and their accuracies are measured:

    superserve convert my-classifier --texts reviews.csv --workdir runs/reviews-subnets

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
import tempfile
from typing import Annotated, Any

import tyro

from superserve_jax import cli, convert, errors, files
from superserve_jax.convert import Pretrained
from superserve_jax.training import data, runs, stages
from superserve_jax.training.config import (
    DistillConfig,
    OptimConfig,
    Phase,
    SearchConfig,
    TrainConfig,
    config_to_json,
    load_config,
)
from superserve_jax.training.data import Dataset, TextFileConfig
from superserve_jax.training.runs import Run

# How a converted classifier is trained further: the published recipe of DynaBERT, as in configs/dynabert_sst2.py.
RECIPE: dict[str, Any] = {
    "optim": OptimConfig(name="adamw", lr=2e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
    "phases": (Phase(elastic=("heads", "ffn"), rewire=True), Phase()),
    "distill": DistillConfig(hidden=0.1),
    "epochs": 6,
    "batch_size": 32,
    "random_subnets": 2,
}


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


@dataclasses.dataclass(frozen=True)
class DirectoryOptions:
    """Options for a directory of Hugging Face.

    Args:
      texts: labelled texts: a file (.csv, .tsv, .jsonl, .parquet), or a folder with train.csv and test.csv.
      text: the name of the column of texts.
      second: the name of the column of second texts, for pairs.
      label: the name of the column of labels. A label is the name of a class or its number.
      candidates: number of subnets that the search tries.
      examples: number of texts on which the search compares subnets.
      workdir: the run's folder; runs/NAME with the directory's name if left out.
      max_length: the longest text in tokens, longer ones are cut; if left out, as many as model and tokenizer can take.
      depths: allowed numbers of layers; if left out, from half of them to all.
      heads: allowed numbers of attention heads of a layer; if left out, quarters of all heads.
      ffn: allowed numbers of feed-forward neurons of a layer; if left out, quarters of all neurons.
      json: write a description to this file.
    """

    texts: pathlib.Path | None = None
    text: str = "text"
    second: str | None = None
    label: str = "label"
    candidates: int = 60
    examples: int = 1000
    workdir: pathlib.Path | None = None
    max_length: int | None = None
    depths: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    ffn: tuple[int, ...] | None = None
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
    print(f"{report(run, options.json)}; go on with `superserve search {run.workdir}`")


def convert_directory(path: pathlib.Path, options: DirectoryOptions) -> None:
    """Makes a run and an export from a directory that `save_pretrained` wrote."""
    cli.refuse_without(options, "texts", "text", "second", "label", "candidates", "examples")
    space = {name: getattr(options, name) for name in ("max_length", "depths", "heads", "ffn")}
    found = convert.from_pretrained(path, **space)
    workdir = runs.check_workdir(options.workdir or pathlib.Path("runs") / path.resolve().name)
    texts = None if options.texts is None else text_config(found, options.texts, options, workdir)
    config = TrainConfig(
        name=path.resolve().name,
        model=found.model.config,
        data=texts,
        search=SearchConfig(candidates=options.candidates, examples=options.examples),
        **RECIPE,
    )
    runs.check_unused(config, workdir)  # before texts are read and units are sorted, which can take minutes
    model = found.model
    if texts is not None and found.vocabulary is not None:
        tokens = found.vocabulary.to_text().encode()
        dataset = open_texts(texts, config, tokens)
        print("sorting heads and neurons by importance")
        model = stages.sorted_by_importance(model, dataset, seed=config.seed)
        files.write_bytes(workdir / runs.VOCABULARY, tokens)
    run = Run.convert(config, workdir, model)
    print(report(run, options.json))
    words = "none, so inputs are token ids" if found.vocabulary is None else f"{len(found.vocabulary.tokens):,} tokens"
    print(f"classes: {', '.join(found.class_names)}\nvocabulary: {words}; texts of up to {found.config.max_length} tokens")
    if texts is not None:
        stages.search(run)
        stages.calibrate(run)
        served = stages.evaluate(run)
        cli.print_table(stages.table(served))
        print(f"{stages.precision(run, served)}; the last row is the original classifier")  # a search keeps the largest subnet
        export = stages.export(run)
        print(f"export: {export} serves these subnets")
    else:
        export = found.export(run.workdir / "export", training=config_to_json(config))
        print(
            f"export: {export} serves the classifier as it is. Its accuracy is unknown. Smaller subnets are not served, "
            "because nobody can tell how well they answer without labelled texts (--texts FILE)"
        )
    print(f"go on with `superserve measure {export}`")


def text_config(found: Pretrained, texts: pathlib.Path, options: DirectoryOptions, workdir: pathlib.Path) -> TextFileConfig:
    """The config of the user's labelled texts. It reads the vocabulary from the run's folder, where it is not written yet."""
    if found.vocabulary is None:
        raise errors.ConversionError("--texts needs a tokenizer in the directory: tokenizer.json or vocab.txt; save it there")
    return TextFileConfig(
        str(files.user_path(texts).absolute()),
        text=options.text,
        second=options.second,
        label=options.label,
        class_names=found.class_names,
        max_length=found.config.max_length,
        token_types=2 if found.config.token_types > 1 else 1,
        vocabulary=str(workdir.absolute() / runs.VOCABULARY),
        lowercase=found.vocabulary.lowercase,
    )


def open_texts(texts: TextFileConfig, config: TrainConfig, tokens: bytes) -> Dataset:
    """Opens the texts before the run's folder is made. So texts that cannot be used leave no folder behind.

    Args:
      texts: the config of the texts.
      config: the run's config.
      tokens: the content of the vocabulary file.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / runs.VOCABULARY
        files.write_bytes(file, tokens)
        return data.open(dataclasses.replace(texts, vocabulary=str(file)), config.model)


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
