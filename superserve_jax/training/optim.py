"""The optimiser and its learning-rate schedule."""

import dataclasses
from typing import Any, Literal

import optax

from superserve_jax import errors
from superserve_jax.training import fields


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Args:
      name: "adamw" or "sgd" (with Nesterov momentum).
      lr: peak learning rate.
      schedule: "cosine" to zero, or "constant"; both after a linear warm-up over `warmup` (a fraction of all steps).
      weight_decay: decoupled from the gradient with adamw, added to it with sgd; norms and biases (parameters of fewer than
        two axes) are spared.
      momentum: of sgd.
      clip_norm: gradients are scaled down to this global norm; 0 leaves them.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 4e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 1e-2
    momentum: float = 0.9
    clip_norm: float = 0.0

    def __post_init__(self):
        for name, known in (("name", ("adamw", "sgd")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in known:
                raise errors.unknown_name(f"optim.{name}", getattr(self, name), known)
        fields.demand_number("optim.lr", self.lr, least=1e-12)
        fields.demand_number("optim.warmup", self.warmup, below=1)
        fields.demand_number("optim.weight_decay", self.weight_decay)
        fields.demand_number("optim.momentum", self.momentum, below=1)
        fields.demand_number("optim.clip_norm", self.clip_norm)

    def create(self, steps: int) -> optax.GradientTransformation:
        """The Optax transformation for a run of `steps` steps."""
        warmup = round(self.warmup * steps)
        cosine = self.schedule == "cosine"
        main = optax.cosine_decay_schedule(self.lr, max(steps - warmup, 1)) if cosine else optax.constant_schedule(self.lr)
        schedule = optax.join_schedules(
            [optax.linear_schedule(self.lr / (warmup + 1), self.lr, max(warmup, 1)), main], [warmup]
        )
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        if self.name == "adamw":
            return optax.chain(clip, optax.adamw(schedule, weight_decay=self.weight_decay, mask=_decayed))
        decay = optax.add_decayed_weights(self.weight_decay, mask=_decayed)
        return optax.chain(clip, decay, optax.sgd(schedule, momentum=self.momentum, nesterov=True))


def _decayed(params: Any) -> dict[str, bool]:
    return {name: value.ndim > 1 for name, value in params.items()}
