"""The stages after training, each on an existing run: search, calibrate, evaluate, export, and standalone subnets to compare.

A stage leaves its result in the run's folder and can be repeated on its own. Programs of the same names are in train/.
"""

import dataclasses
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, exports, machine, plots, progress
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.exports import Served
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import RewirableConfig
from superserve_jax.supernets.supernet import Norm, SuperNet
from superserve_jax.training import calibration, evaluation, latency, loop, rewiring, validation
from superserve_jax.training.config import DistillConfig, TrainConfig, config_to_json
from superserve_jax.training.data import DatasetLike, fingerprints, halves
from superserve_jax.training.latency import Predictor
from superserve_jax.training.runs import Run
from superserve_jax.training.search import Candidate, SearchLog, choose_served, evolutionary_search, pareto_front

_TIMED = 40  # subnets that are timed if latency is the cost


def search(run: Run) -> list[Candidate]:
    """Tries subnets on validation data and chooses the subnets to serve, in ascending order of cost.

    Writes search.json and search.png, and each candidate at once to search.jsonl. An interrupted search, or a search for more
    candidates, goes on from search.jsonl.
    """
    settings, model, dataset = run.config.search, run.model(), run.dataset()
    images, _ = dataset.arrays("train", limit=settings.calibration_examples)
    batches = validation.batches(dataset, settings)
    timed = latency.spread(model.config, _TIMED, seed=run.config.seed) if settings.cost == "latency" else []
    depends_on = {**accuracies_depend_on(run, model, images, batches), "cost": settings.cost}
    if timed:
        depends_on |= {
            "latency_batch": settings.latency_batch,
            "device": machine.device_kind(jax.devices()[0]),
            "timed": len(timed),
        }
    space = run.config.last_phase.space(model.config)
    log = SearchLog(
        run.workdir / "search.jsonl",
        depends_on,
        measure=lambda: latency.measure(model, timed, batch=settings.latency_batch) if timed else {},
    )
    predictor = Predictor(model.config, log.latencies) if timed else None
    candidates = evolutionary_search(
        model,
        images,
        batches,
        candidates=settings.candidates,
        seed=run.config.seed,
        cost=predictor,
        space=space,
        tied=run.config.last_phase.tied,
        known=log.known,
    )
    tried = []
    for candidate in progress.track(candidates, "search", total=min(settings.candidates, space.size)):
        log.add(candidate)
        tried.append(candidate)
    best, examples = max(c.accuracy for c in tried), min(settings.examples, dataset.num_examples("validation"))
    error = standard_error(best, examples)
    chosen = choose_served(
        tried,
        settings.served,
        keep=(model.space.validate(space.smallest()), space.largest()),
        tolerance=settings.tolerance,
    )
    run.write(
        "search.json",
        {
            "cost": settings.cost,
            "tolerance": settings.tolerance,
            "standard_error": error,
            "latency_error": predictor.error if predictor else None,
            "candidates": [c.to_json() for c in tried],
            "served": [s.to_json() for s in sorted((c.subnet for c in chosen), key=model.config.flops)],
        },
    )
    label, unit = "MFLOPs per input (million multiply-adds)", 1e6
    if timed:
        label, unit = f"latency of a batch of {settings.latency_batch} (ms), predicted", 1.0
    cloud, front, served = ([(c.cost / unit, c.accuracy) for c in group] for group in (tried, pareto_front(tried), chosen))
    title = f"Search of {run.config.name}"
    plots.search(cloud, front, served, run.workdir / "search.png", cost=label, error=error, title=title)
    return chosen


def accuracies_depend_on(
    run: Run, model: SuperNet, images: np.ndarray, batches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Everything that the validation accuracies of a search depend on, as plain values: network, weights and examples."""
    return {
        "model": config_to_json(run.config)["model"],
        "weights": _digest(model.params),
        "data": _digest({"inputs": images}, *batches),
    }


def sorted_by_importance(model: SuperNet, dataset: DatasetLike, *, seed: int = 0) -> SuperNet:
    """The same network with heads, neurons or channels in order of importance on training data, see `rewiring.py`.

    Its largest subnet computes the same function. Smaller subnets keep the most important units. There are no statistics.
    """
    if not isinstance(model.config, RewirableConfig):
        raise errors.ConfigError(f"family '{model.config.family}' has no units to sort (its config has no method units)")
    orders = rewiring.orders_on(model.config, model.params, dataset, seed=seed)
    return SuperNet(model.config, rewiring.reorder(model.config, dict(model.params), orders))


def _digest(*groups: Mapping[str, Any]) -> str:
    """SHA-256 of groups of arrays, each in order of the names."""
    return fingerprints.sha256(np.asarray(arrays[name]) for arrays in groups for name in sorted(arrays))


def calibrate(run: Run, subnet_list: list[Subnet] | None = None) -> None:
    """Computes the SubnetNorm statistics of subnets over training data and writes them into the run's folder.

    Args:
      run: the run.
      subnet_list: the subnets to calibrate; the subnets that the search chose if left out.
    """
    images, _ = run.dataset().arrays("train", limit=run.config.calibration_examples)
    served = run.served() if subnet_list is None else subnet_list
    run.save_statistics(calibration.calibrate(run.model(), progress.track(served, "calibration"), images))


def evaluate(run: Run, *, bfloat16: bool = False) -> list[Served]:
    """Measures accuracies of the served subnets, with their own and with the largest subnet's statistics.

    They come from the profiling half of the test split (see `halves.profiling_half`). A replay sends the other half, so it
    measures something that the policy does not know.

    Writes evaluation.json. For a family without statistics, `accuracy_shared` is None.

    Args:
      run: the run.
      bfloat16: also measure accuracies of a network that computes in bfloat16, with the subnets' own statistics.
    """
    model, dataset, served = run.model(), run.dataset(), run.served()

    def accuracies(norm: Norm, compute_dtype: ComputeDtype = "float32") -> list[float]:
        subnets = progress.track(served, f"subnets on test examples, {norm} statistics, {compute_dtype}")
        how: dict[str, Any] = {"norm": norm, "compute_dtype": compute_dtype}
        found = evaluation.correct(model, subnets, lambda: dataset.eval("test", validation.EVAL_BATCH), **how)
        return [float(hits[halves.profiling_half(labels)].mean()) for hits, labels in found]

    own = accuracies("own")
    shared = accuracies("shared") if model.statistics_of(model.space.largest()).size else [None] * len(own)
    in_bfloat16 = accuracies("own", "bfloat16") if bfloat16 else [None] * len(own)
    result = [
        Served(s, a, a_shared, model.config.flops(s), model.config.num_params(s), profiled_half=True, accuracy_bfloat16=a_16)
        for s, a, a_shared, a_16 in zip(served, own, shared, in_bfloat16, strict=True)
    ]
    run.write("evaluation.json", [s.to_json() for s in result])
    return result


def baselines(run: Run) -> dict[str, float]:
    """Test accuracies of the baselines for texts (see `evaluation.text_baselines`); empty for other data."""
    dataset = run.dataset()
    return {} if dataset.vocabulary is None else evaluation.text_baselines(dataset)


def export(run: Run, path: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Writes the export of an evaluated run, by default into its folder; returns its path.

    It offers the evaluated subnets, which the search chose by their validation accuracy.
    """
    dataset, evaluated = run.dataset(), run.evaluated()
    half = "the profiling half of " if _profiled_half(evaluated) else ""
    return exports.export(
        path if path is not None else run.workdir / "export",
        run.model(),
        evaluated,
        measured=f"top-1 on {half}the {dataset.num_examples('test')} test examples of {dataset.name}, masked program, each "
        f"subnet's own statistics from {run.config.calibration_examples} training examples",
        class_names=dataset.class_names,
        vocabulary=dataset.vocabulary,
        training=config_to_json(run.config),
    )


def standalone_config(shared: TrainConfig, subnet: Subnet) -> TrainConfig:
    """The SuperNet's config for a single subnet that learns from labels only.

    Initial weights, data, optimiser and number of steps stay the same.
    """
    model = SingleSubnetConfig(shared.model, subnet)
    return dataclasses.replace(
        shared, model=model, phases=(), distill=DistillConfig(), random_subnets=0, buckets=1, eval_every=0, wandb=None
    )


def standalone(run: Run, subnet: Subnet, name: str) -> Served:
    """Trains, calibrates and evaluates one subnet of a run as a standalone network.

    This makes another run, in the folder alone/NAME of the given run. An interrupted one goes on; a finished one is only read.

    Raises:
      KeyboardInterrupt, ConfigError, DataError: as in `loop.train`.
    """
    if run.converted:
        raise errors.ConfigError(
            f"{run.workdir} began with converted weights. Standalone subnets begin with random weights, so the comparison "
            f"would say nothing about sharing; choose a run that was trained from random weights"
        )
    run.dataset()  # raises if the data has changed, so that both networks learn from the same examples
    alone = loop.train(standalone_config(run.config, subnet), run.workdir / "alone" / name, dataset=run.given)
    if not (alone.workdir / "evaluation.json").is_file():
        # A space of one subnet needs no search.
        only = alone.config.model.space().largest()
        alone.write("search.json", {"candidates": [], "served": [only.to_json()]})
        calibrate(alone)
        evaluate(alone)
    [measured] = alone.evaluated()
    return measured


def precision(run: Run, served: Sequence[Served]) -> str:
    """A line to print below `table`: on how many test examples accuracies are based, and the median's standard error."""
    total = run.dataset().num_examples("test")
    half = _profiled_half(served)
    count = total // 2 if half else total
    middle = statistics.median(s.accuracy for s in served if s.accuracy is not None)
    source = f"about {count:,} test examples, one half of the {total:,}" if half else f"all {total:,} test examples"
    error = 100 * standard_error(middle, count)
    return f"test accuracies are those on {source}; standard error of an accuracy: {error:.1f} points"


def standard_error(accuracy: float, examples: int) -> float:
    """The standard error of an accuracy that was measured on so many examples."""
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def _profiled_half(served: Sequence[Served]) -> bool:
    """Whether accuracies come from the profiling half of the test split. An older version used the whole split."""
    return all(s.profiled_half for s in served)


def table(served: list[Served]) -> list[tuple[str, ...]]:
    """A table to print: the header, then cost and accuracies of each served subnet."""
    columns = {
        "test accuracy": [s.accuracy for s in served],
        "with the largest's statistics": [s.accuracy_shared for s in served],
        "in bfloat16": [s.accuracy_bfloat16 for s in served],
    }
    measured = {name: of for name, of in columns.items() if name == "test accuracy" or any(a is not None for a in of)}
    costs = [(f"{s.flops / 1e6:.2f}", f"{s.params:,}") for s in served]
    accuracies = zip(*(["-" if a is None else f"{100 * a:.2f} %" for a in of] for of in measured.values()), strict=True)
    return [("MFLOPs", "params", *measured), *(a + b for a, b in zip(costs, accuracies, strict=True))]
