"""Search under constraints: the most accurate subnet of a run under a latency, a size or a number of multiply-adds.

1. Some subnets, spread over the FLOPs, are calibrated and evaluated on validation examples.
2. A regression learns their accuracies (`predictor.py`), and a latency table predicts latencies (`latency_table.py`).
3. An evolutionary search compares thousands of subnets by these predictions. A random search is its control (`evolution.py`).
4. The best subnets of both are calibrated, evaluated and timed.

If a space has too few networks to learn from, all of them are evaluated, and nothing is predicted.
"""

import dataclasses
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import jax
import msgspec

from superserve_jax import errors, machine, progress
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import evolution, fields, latency, latency_table, predictor, search, stages, validation
from superserve_jax.training.constrained_report import Report, Winner
from superserve_jax.training.constraints import Constraints, CostModel
from superserve_jax.training.evolution import Meets
from superserve_jax.training.fields import Positive
from superserve_jax.training.latency_table import LatencyTable
from superserve_jax.training.predictor import AccuracyPredictor
from superserve_jax.training.runs import Run
from superserve_jax.training.search import Candidate, SearchLog

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The amount of work of a search under constraints.

    Args:
      samples: number of evaluated networks that the predictor learns from. Candidates of `stages.search` count, up to a half.
      predictions: number of subnets that the evolutionary search compares, and as many for the random search.
      winners: number of the best subnets of either search that are evaluated.
      dtype: the dtype that subnets compute in. Their size depends on it.
    """

    samples: Annotated[int, msgspec.Meta(ge=predictor.LEAST)] = 200
    predictions: Positive = 2000
    winners: Positive = 5
    dtype: ComputeDtype = "float32"

    def __post_init__(self):
        fields.check(self)


def search_under(
    run: Run,
    constraints: Constraints,
    settings: Settings = Settings(),
    *,
    table: LatencyTable | None = None,
    device: str | None = None,
) -> Report:
    """Searches a trained run for the most accurate subnet that meets all constraints.

    Writes constrained.json, and each evaluated subnet at once to constrained.jsonl. An interrupted search goes on from there.
    Subnets that `stages.search` evaluated are not evaluated again. The test split is not read.

    Args:
      run: the run.
      constraints: the limits.
      settings: the amount of work.
      table: a latency table of another device. By default this device is measured once, and its table is kept in the run's
        folder latency_tables/.
      device: the name of this machine's device, for the table; that of `machine.device_kind` if left out.

    Raises:
      ConfigError: no subnet meets the constraints; or the latency table is of another network or batch size, or no latency is
        limited.
    """
    device = device or machine.device_kind(jax.devices()[0])
    model, config = run.model(), run.config.model
    space, whole = run.config.last_phase.space(config), config.space()
    if constraints.latency_ms is None and table is not None:
        raise errors.ConfigError("a latency table has no effect without a limit of the latency, such as latency_ms=5.0")
    smallest = whole.validate(space.smallest())
    constraints.check_reachable(CostModel(config, dtype=settings.dtype)(smallest))  # before any program is compiled and timed
    if constraints.latency_ms is not None:
        table = _latency_table(run, model, table, device)
    timer = table.predictor(config) if table else None
    costs = CostModel(config, latency=timer, dtype=settings.dtype)
    # Predicted latencies are a little wrong, so the limit of the search is lower by their mean error.
    margin = 1 + timer.error if timer else 1.0
    slowed = CostModel(config, latency=lambda s: timer(s) * margin, dtype=settings.dtype) if timer else costs
    constraints.check_reachable(costs(smallest), margin=margin)

    def meets(subnet: Subnet) -> bool:
        return constraints.hold_for(slowed(whole.validate(subnet)))

    evaluate = _Evaluation(run, model)
    accuracies = _sample(run, settings, evaluate)
    has_few = _count(config, accuracies) < predictor.LEAST  # then these are all networks
    accuracy = None if has_few else AccuracyPredictor(config, accuracies)
    allowed = {subnet: value for subnet, value in accuracies.items() if meets(subnet)}
    found = {"evaluated": _best(config, allowed, settings.winners if has_few else 1)}
    compared = (0, 0)
    if accuracy:
        evolved, drawn = _compare(run, settings, meets, accuracy, accuracies)
        found |= {
            "evolution": _best(config, evolved, settings.winners),
            "random search": _best(config, drawn, settings.winners),
        }
        compared = len(evolved), len(drawn)
    every = list(dict.fromkeys(s for group in found.values() for s in group))
    measured = evaluate(every, "evaluating winners")
    is_own = table is not None and table.device == device
    times = latency.measure(model, every, batch=table.batch) if table and is_own else {}
    predicted = dict(zip(every, accuracy.unseen(every), strict=True)) if accuracy else {}

    def winners(found_by: str) -> tuple[Winner, ...]:
        ordered = _best(config, {s: measured[s] for s in found.get(found_by, ())}, settings.winners)
        return tuple(Winner(s, found_by, costs(s), predicted.get(s), measured[s], times.get(s)) for s in ordered)

    report = Report(
        constraints,
        winners=winners("evolution" if accuracy else "evaluated"),
        control=winners("random search"),
        best_evaluated=next(iter(winners("evaluated")), None) if accuracy else None,
        samples=len(accuracies),
        rmse=accuracy and accuracy.rmse,
        kendall_tau=accuracy and accuracy.kendall_tau,
        predictions=compared,
        standard_error=stages.standard_error(max(measured.values()), evaluate.examples),
        latency={"batch": table.batch, "device": table.device, "error": timer.error} if table and timer else None,
    )
    run.write("constrained.json", report.to_json())
    return report


def serve(run: Run, subnet: Subnet) -> None:
    """Adds a subnet to the served ones in search.json. Calibrate, evaluate and export the run again afterwards."""
    path = run.workdir / "search.json"
    found = run.read("search.json", made_by="superserve search") if path.exists() else {"candidates": [], "served": []}
    served = {Subnet.from_json(s) for s in found["served"]} | {run.config.model.space().validate(subnet)}
    run.write("search.json", {**found, "served": [s.to_json() for s in sorted(served, key=run.config.model.flops)]})


class _Evaluation:
    """Evaluates subnets of a run on validation examples, and keeps their accuracies in constrained.jsonl.

    Attributes:
      earlier: accuracies that `stages.search` measured with the same weights and examples.
      examples: number of validation examples.
    """

    def __init__(self, run: Run, model: SuperNet):
        settings, dataset = run.config.search, run.dataset()
        images, _ = dataset.arrays("train", limit=settings.calibration_examples)
        batches = validation.batches(dataset, settings)
        depends_on = stages.accuracies_depend_on(run, model, images, batches)
        self.earlier = search.evaluated(run.workdir / "search.jsonl", depends_on)
        self.examples = min(settings.examples, dataset.num_examples("validation"))
        self._log = SearchLog(run.workdir / "constrained.jsonl", depends_on)
        self._known = {s: c.accuracy for s, c in self._log.known.items()} | self.earlier
        self._measure = search.accuracy_of(model, images, batches)
        self._flops = model.config.flops

    def __call__(self, subnet_list: Sequence[Subnet], description: str) -> dict[Subnet, float]:
        """The accuracies of subnets. Those that are known already are not measured again."""
        for subnet in progress.track(subnet_list, description):
            if subnet not in self._known:
                self._known[subnet] = self._measure(subnet)
                self._log.add(Candidate(subnet, self._flops(subnet), self._known[subnet]))
        return {s: self._known[s] for s in subnet_list}


def _compare(
    run: Run, settings: Settings, meets: Meets, accuracy: AccuracyPredictor, start: Iterable[Subnet]
) -> tuple[dict[Subnet, float], dict[Subnet, float]]:
    """The predicted accuracies of the subnets that the evolutionary search compares, and of those of the random search."""
    phase, whole = run.config.last_phase, run.config.model.space()
    space = phase.space(run.config.model)

    def predict(subnets: Sequence[Subnet]) -> list[float]:
        return accuracy([whole.validate(s) for s in subnets])

    how: dict[str, Any] = {"count": settings.predictions, "seed": run.config.seed, "tied": phase.tied}
    evolved = evolution.evolve(space, meets, predict, start=[space.validate(s) for s in start], **how)
    drawn = evolution.random_search(space, meets, predict, **how)
    first, second = ({whole.validate(s): value for s, value in found.items()} for found in (evolved, drawn))
    return first, second


def _sample(run: Run, settings: Settings, evaluate: _Evaluation) -> dict[Subnet, float]:
    """The accuracies of earlier candidates and of subnets spread over the FLOPs. Those of all networks if these are few."""
    config, phase = run.config.model, run.config.last_phase

    def spread(count: int) -> dict[Subnet, float]:
        chosen = evolution.spread(config, count, seed=run.config.seed, space=phase.space(config), tied=phase.tied)
        return evaluate([config.space().validate(s) for s in chosen], "evaluating samples")

    count = max(settings.samples - _count(config, evaluate.earlier), settings.samples // 2)
    accuracies = evaluate.earlier | spread(count)
    # The spread subnets may be the earlier ones again.
    return accuracies if _count(config, accuracies) >= predictor.LEAST else accuracies | spread(settings.samples)


def _count(config: FamilyConfig, subnets: Iterable[Subnet]) -> int:
    """The number of different networks."""
    return len({evolution.network(config, subnet) for subnet in subnets})


def _best(config: FamilyConfig, accuracies: Mapping[Subnet, float], count: int) -> list[Subnet]:
    """The `count` most accurate networks, best first. Of subnets with equal sizes, which are one network, only the first."""
    ordered = sorted(accuracies, key=lambda s: -accuracies[s])
    networks: dict[Hashable, Subnet] = {}
    for subnet in ordered:
        networks.setdefault(evolution.network(config, subnet), subnet)
    return list(networks.values())[:count]


def _latency_table(run: Run, model: SuperNet, given: LatencyTable | None, device: str) -> LatencyTable:
    """The given table, or that of this device. Raises ConfigError for another batch size than the run's."""
    batch = run.config.search.latency_batch
    if given is None:
        how: dict[str, Any] = {"device": device, "batch": batch, "seed": run.config.seed}
        return latency_table.read_or_measure(run.workdir / "latency_tables", model, **how)
    if given.batch != batch:
        raise errors.ConfigError(
            f"the latency table of '{given.device}' is of batches of {given.batch}, and the limit is of batches of {batch}; "
            f"give --latency-batch {given.batch} (search.latency_batch), or a table of batches of {batch}"
        )
    return given
