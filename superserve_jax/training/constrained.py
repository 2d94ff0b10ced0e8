"""Search under constraints: the most accurate subnet of a run under a latency, a size or a number of multiply-adds.

1. Some subnets, spread over the FLOPs, are calibrated and evaluated on validation examples.
2. A regression learns their accuracies (`predictor.py`), and a latency table predicts latencies (`latency_table.py`).
3. An evolutionary search compares thousands of subnets by these predictions. A random search is its control (`evolution.py`).
4. The best subnets of both are calibrated, evaluated and timed.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import msgspec

from superserve_jax import errors, progress
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import evolution, fields, latency, latency_table, predictor, search, stages, validation
from superserve_jax.training.constraints import Constraints, CostModel, Costs
from superserve_jax.training.fields import AboveZero, Positive
from superserve_jax.training.latency_table import LatencyTable
from superserve_jax.training.predictor import AccuracyPredictor
from superserve_jax.training.runs import Run
from superserve_jax.training.search import Candidate, SearchLog

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The amount of work of a search under constraints.

    Args:
      samples: number of evaluated subnets that the predictor learns from. Candidates of `stages.search` count, up to a half.
      predictions: number of subnets that the evolutionary search compares, and as many for the random search.
      winners: number of the best subnets of either search that are evaluated.
      dtype: dtype of the weights. Their size depends on it.
    """

    samples: Annotated[int, msgspec.Meta(ge=predictor.LEAST)] = 200
    predictions: Positive = 2000
    winners: Positive = 5
    dtype: ComputeDtype = "float32"

    def __post_init__(self):
        fields.check(self)


@dataclasses.dataclass(frozen=True)
class Winner:
    """A subnet that meets the constraints, with its predicted and measured values.

    Args:
      subnet: the subnet.
      found_by: "evolution", "random search", or "evaluated" for the best of the subnets that the predictor learned from.
      costs: its costs. The latency is predicted.
      predicted: the predicted accuracy, as a fraction, by a predictor that has not seen the subnet.
      accuracy: the measured accuracy on validation examples, as a fraction.
      measured_ms: the measured latency; None without a limit of it, or with the latency table of another device.
    """

    subnet: Subnet
    found_by: str
    costs: Costs
    predicted: float
    accuracy: float
    measured_ms: AboveZero | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        return {**dataclasses.asdict(self), "subnet": self.subnet.to_json()}


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a search under constraints.

    Args:
      constraints: the constraints.
      winners: the best subnets of the evolutionary search, best measured accuracy first.
      control: the same for the random search.
      best_evaluated: the best of the subnets that the predictor learned from, under the same constraints.
      samples: number of these subnets.
      rmse: root mean squared error of the predictor on held-out subnets, as a fraction.
      kendall_tau: rank correlation of predicted and measured accuracies of held-out subnets.
      predictions: numbers of subnets that the evolutionary search and the random search compared.
      standard_error: standard error of a measured accuracy, as a fraction.
      latency: batch size, device and mean relative error of the latency predictions; None without a limit of the latency.
    """

    constraints: Constraints
    winners: tuple[Winner, ...]
    control: tuple[Winner, ...]
    best_evaluated: Winner | None
    samples: int
    rmse: float
    kendall_tau: float
    predictions: tuple[int, int]
    standard_error: float
    latency: dict[str, Any] | None = None

    @property
    def rows(self) -> tuple[Winner, ...]:
        """All subnets of the report."""
        return (*self.winners, *self.control, *([self.best_evaluated] if self.best_evaluated else []))

    @property
    def best(self) -> Winner:
        """The most accurate subnet that is within the limits. If all measured latencies are above, the fastest subnet."""
        within = [w for w in self.rows if self.is_within(w)]
        if within:
            return max(within, key=lambda w: w.accuracy)
        return min(self.rows, key=lambda w: w.measured_ms or 0.0)

    def is_within(self, winner: Winner) -> bool:
        """Whether the measured latency of a subnet of the report is within the limit. All other costs are."""
        limit = self.constraints.latency_ms
        return limit is None or winner.measured_ms is None or winner.measured_ms <= limit

    def to_json(self) -> dict[str, Any]:
        """A dict for `json.dump`."""
        numbers = ("samples", "rmse", "kendall_tau", "predictions", "standard_error", "latency")
        return {
            "constraints": dataclasses.asdict(self.constraints),
            "subnet": self.best.subnet.to_json(),
            **{name: getattr(self, name) for name in numbers},
            "winners": [w.to_json() for w in self.winners],
            "control": [w.to_json() for w in self.control],
            "best_evaluated": self.best_evaluated and self.best_evaluated.to_json(),
        }


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
      device: the name of this machine's device, for the table; jax's name for it if left out.

    Raises:
      ConfigError: no subnet meets the constraints, or the latency table is of another network.
    """
    device = device or jax.devices()[0].device_kind
    model, config = run.model(), run.config.model
    space, tied, whole = run.config.last_phase.space(config), run.config.last_phase.tied, config.space()
    if constraints.latency_ms is None:
        table = None
    elif table is None:
        table = _own_table(run, model, device)
    timer = table.predictor(config) if table else None
    costs = CostModel(config, latency=timer, dtype=settings.dtype)
    # Predicted latencies are a little wrong, so the limit of the search is lower by their mean error.
    slowed = CostModel(config, latency=lambda s: timer(s) * (1 + timer.error), dtype=settings.dtype) if timer else costs

    def meets(subnet: Subnet) -> bool:
        return constraints.hold_for(slowed(whole.validate(subnet)))

    if not meets(space.smallest()):
        least = _described(costs(whole.validate(space.smallest())))
        raise errors.ConfigError(f"no subnet has {constraints}: the smallest one has {least}; allow more")
    evaluate = _Evaluation(run, model)
    count = max(settings.samples - len(evaluate.earlier), settings.samples // 2)
    sampled = evolution.spread(config, count, seed=run.config.seed, space=space, tied=tied)
    accuracies = evaluate.earlier | evaluate([whole.validate(s) for s in sampled], "evaluating samples")
    accuracy = AccuracyPredictor(config, accuracies)

    def predict(subnets: Sequence[Subnet]) -> list[float]:
        return accuracy([whole.validate(s) for s in subnets])

    how: dict[str, Any] = {"count": settings.predictions, "seed": run.config.seed, "tied": tied}
    evolved = evolution.evolve(space, meets, predict, start=[space.validate(s) for s in accuracies], **how)
    drawn = evolution.random_search(space, meets, predict, **how)
    found = {
        "evolution": _best(config, {whole.validate(s): value for s, value in evolved.items()}, settings.winners),
        "random search": _best(config, {whole.validate(s): value for s, value in drawn.items()}, settings.winners),
        "evaluated": _best(config, {s: value for s, value in accuracies.items() if meets(s)}, 1),
    }
    every = list(dict.fromkeys(s for group in found.values() for s in group))
    measured = evaluate(every, "evaluating winners")
    is_own = table is not None and table.device == device
    times = latency.measure(model, every, batch=table.batch) if table and is_own else {}
    predicted = dict(zip(every, accuracy(every), strict=True)) | accuracy.held_out

    def winners(found_by: str) -> tuple[Winner, ...]:
        ordered = _best(config, {s: measured[s] for s in found[found_by]}, settings.winners)
        return tuple(Winner(s, found_by, costs(s), predicted[s], measured[s], times.get(s)) for s in ordered)

    report = Report(
        constraints,
        winners=winners("evolution"),
        control=winners("random search"),
        best_evaluated=next(iter(winners("evaluated")), None),
        samples=len(accuracies),
        rmse=accuracy.rmse,
        kendall_tau=accuracy.kendall_tau,
        predictions=(len(evolved), len(drawn)),
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


def _best(config: FamilyConfig, accuracies: Mapping[Subnet, float], count: int) -> list[Subnet]:
    """The `count` most accurate networks, best first. Of subnets with equal sizes, which are one network, only the first."""
    ordered = sorted(accuracies, key=lambda s: -accuracies[s])
    networks: dict[Any, Subnet] = {}
    for subnet in ordered:
        networks.setdefault(tuple(config.sizes(subnet).items()), subnet)
    return list(networks.values())[:count]


def _own_table(run: Run, model: SuperNet, device: str) -> LatencyTable:
    """The table of this device in the run's folder. It is measured if it does not exist."""
    batch = run.config.search.latency_batch
    path = run.workdir / "latency_tables" / latency_table.file_name(device, batch)
    if path.exists():
        return LatencyTable.read(path)
    table = LatencyTable.measure(model, device=device, batch=batch, seed=run.config.seed)
    path.parent.mkdir(exist_ok=True)
    table.write(path)
    _log.info("%s has the latencies of %d subnets on '%s'", path, len(table.latencies), device)
    return table


def _described(costs: Costs) -> str:
    """Costs in words, for messages."""
    time = "" if costs.latency_ms is None else f", {costs.latency_ms:.3g} ms"
    return f"{costs.flops / 1e6:.4g} M multiply-adds, {costs.size_bytes / 1e6:.4g} MB{time}"
