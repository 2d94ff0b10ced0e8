"""What follows training, each stage on an existing run: search, calibrate, evaluate, export. Each leaves its result in the
run's folder and may be repeated by itself; programs of the same names are in train/."""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from superserve_jax import exports, plots, progress
from superserve_jax.exports import Served
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.supernet import Norm
from superserve_jax.training import calibration, evaluation, latency, phases
from superserve_jax.training.config import config_to_json
from superserve_jax.training.latency import Predictor
from superserve_jax.training.runs import Run
from superserve_jax.training.search import Candidate, Log, choose_served, evolutionary_search, pareto_front, standard_error

_EVAL_BATCH = 250
_TIMED = 40  # subnets that are timed where latency is the cost


def search(run: Run) -> list[Candidate]:
    """Tries subnets on validation images and chooses those to serve, in ascending order of cost: search.json, search.png.

    What was tried stands in search.jsonl: an interrupted search goes on from there, and so does one for more candidates.
    """
    settings, model, dataset = run.config.search, run.model(), run.dataset()
    images, _ = dataset.arrays("train", limit=settings.calibration_examples)
    batches = list(itertools.islice(dataset.eval("validation", _EVAL_BATCH), -(-settings.examples // _EVAL_BATCH)))
    timed = latency.spread(model.config, _TIMED, seed=run.config.seed) if settings.cost == "latency" else []

    def measure() -> dict[Subnet, float]:
        return latency.measure(
            model,
            timed,
            batch=settings.latency_batch,
            progress=lambda items: progress.track(items, "latencies, compiling", total=len(timed)),
        )

    narrowed = phases.final_space(run.config)
    depends_on = {
        "model": config_to_json(run.config)["model"],
        "weights": _digest(model.params),
        "data": _digest({"inputs": images}, *batches),
        "cost": settings.cost,
    }
    if timed:
        depends_on |= {"latency_batch": settings.latency_batch, "device": jax.devices()[0].device_kind, "timed": len(timed)}
    with Log(run.workdir / "search.jsonl", depends_on, measure=measure) as log:
        predictor = Predictor(model.config, log.latencies) if timed else None
        tried = evolutionary_search(
            model,
            images,
            lambda: batches,
            candidates=settings.candidates,
            seed=run.config.seed,
            cost=predictor,
            space=narrowed,
            tied=phases.tied(run.config),
            known=log.known,
            record=log.add,
            progress=lambda items: progress.track(items, "search", total=min(settings.candidates, narrowed.size)),
        )
    best = max(c.accuracy for c in tried)
    error = standard_error(best, min(settings.examples, dataset.num_examples("validation")))
    chosen = choose_served(
        tried,
        settings.served,
        keep=phases.ends(run.config),
        tolerance=error if settings.tolerance is None else settings.tolerance,
        network=lambda s: tuple(model.config.sizes(s).values()),
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
    cloud, front, served = ([(c.cost, c.accuracy) for c in group] for group in (tried, pareto_front(tried), chosen))
    label = f"latency of a batch of {settings.latency_batch} (ms), predicted" if timed else "multiply-adds per input"
    plots.search(cloud, front, served, run.workdir / "search.png", cost=label)
    return chosen


def _digest(*groups: Mapping[str, Any]) -> str:
    """SHA-256 of arrays by name."""
    digest = hashlib.sha256()
    for arrays in groups:
        for name in sorted(arrays):
            digest.update(np.asarray(arrays[name]).tobytes())
    return digest.hexdigest()


def calibrate(run: Run, subnet_list: list[Subnet] | None = None) -> None:
    """Computes SubnetNorm statistics over training images: statistics.npz.

    Args:
      run: the run.
      subnet_list: subnets to calibrate; those that the search chose, where it is None.
    """
    images, _ = run.dataset().arrays("train", limit=run.config.calibration_examples)
    served = subnet_list if subnet_list is not None else run.served()
    rows = calibration.calibrate(
        run.model(), served, images, progress=lambda items: progress.track(items, "calibration", total=len(served))
    )
    run.save_statistics(rows)


def evaluate(run: Run) -> list[Served]:
    """Accuracy of the served subnets on test examples, with their own statistics and, where the family has any, with the
    largest's: evaluation.json."""
    model, dataset = run.model(), run.dataset()
    served = run.served()

    def accuracies(norm: Norm) -> list[float]:
        return evaluation.accuracy(
            model,
            served,
            lambda: dataset.eval("test", _EVAL_BATCH),
            norm=norm,
            progress=lambda items: progress.track(items, f"test examples, {norm} statistics", total=len(served)),
        )

    own = accuracies("own")
    shared = accuracies("shared") if model.statistics_of(model.space.largest()).size else [None] * len(own)
    result = [
        Served(s, accuracy, other, model.config.flops(s), model.config.num_params(s))
        for s, accuracy, other in zip(served, own, shared, strict=True)
    ]
    run.write("evaluation.json", [s.to_json() for s in result])
    return result


def baselines(run: Run) -> dict[str, float]:
    """Test accuracies that a model of texts has to beat (see `evaluation.text_baselines`); none for other data."""
    dataset = run.dataset()
    return {} if dataset.vocabulary is None else evaluation.text_baselines(dataset)


def export(run: Run, path: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Writes the export of an evaluated run, by default into its folder; returns where.

    It offers the subnets that are more accurate on test images than every cheaper one, and the largest; all that were
    evaluated, where the search was given a tolerance.
    """
    evaluated = [Served.from_json(s) for s in run.read("evaluation.json", made_by="train/evaluate.py")]
    evaluated.sort(key=lambda s: s.flops)
    if run.read("search.json", made_by="train/search.py").get("tolerance") is None:
        best = [0.0, *itertools.accumulate((s.accuracy for s in evaluated), max)]
        evaluated = [s for s, before in zip(evaluated, best, strict=False) if s.accuracy > before or s is evaluated[-1]]
    dataset = run.dataset()
    return exports.export(
        path if path is not None else run.workdir / "export",
        run.model(),
        evaluated,
        measured=f"top-1 on the {dataset.num_examples('test')} test examples of {dataset.name}, masked program, each "
        f"subnet's own statistics from {run.config.calibration_examples} training examples",
        class_names=dataset.class_names,
        vocabulary=dataset.vocabulary,
        training=config_to_json(run.config),
    )


def table(served: list[Served]) -> list[tuple[str, ...]]:
    """Header and rows for printing: cost and accuracies of served subnets."""
    header, shown = ("MFLOPs", "params", "test accuracy", "with the largest's statistics"), 4
    if all(s.accuracy_shared is None for s in served):
        shown = 3
    rows = [
        (
            f"{s.flops / 1e6:.2f}",
            f"{s.params:,}",
            f"{100 * s.accuracy:.2f} %",
            "-" if s.accuracy_shared is None else f"{100 * s.accuracy_shared:.2f} %",
        )
        for s in served
    ]
    return [row[:shown] for row in (header, *rows)]
