"""The result of a search under constraints: the best subnets, and how good the predictions were."""

import dataclasses
from typing import Any

from superserve_jax.subnet import Subnet
from superserve_jax.training.constraints import Constraints, Costs
from superserve_jax.training.fields import AboveZero


@dataclasses.dataclass(frozen=True)
class Winner:
    """A subnet that meets the constraints, with its predicted and measured values.

    Args:
      subnet: the subnet.
      found_by: "evolution", "random search", or "evaluated" for the subnets that the predictor learned from.
      costs: its costs. The latency is predicted.
      predicted: the predicted accuracy, as a fraction, by a regression that has not seen the network. None if all networks of
        a small space were evaluated.
      accuracy: the measured accuracy on validation examples, as a fraction.
      measured_ms: the measured latency; None without a limit of it, or with the latency table of another device.
    """

    subnet: Subnet
    found_by: str
    costs: Costs
    predicted: float | None
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
      winners: the best subnets of the evolutionary search, best measured accuracy first. If all networks of a small space were
        evaluated, the best of all.
      control: the same for the random search. Empty if all networks were evaluated.
      best_evaluated: the best of the subnets that the predictor learned from, under the same constraints. None without one.
      samples: number of the evaluated subnets that were not chosen by a prediction.
      rmse: root mean squared error of the predictor on held-out subnets, as a fraction. None if all networks were evaluated.
      kendall_tau: rank correlation of predicted and measured accuracies of held-out subnets, or None.
      predictions: numbers of subnets that the evolutionary search and the random search compared.
      standard_error: standard error of a measured accuracy, as a fraction.
      latency: batch size, device and mean relative error of the latency predictions; None without a limit of the latency.
    """

    constraints: Constraints
    winners: tuple[Winner, ...]
    control: tuple[Winner, ...]
    best_evaluated: Winner | None
    samples: int
    rmse: float | None
    kendall_tau: float | None
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
