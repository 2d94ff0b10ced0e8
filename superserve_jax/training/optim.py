"""The optimiser and its learning-rate schedule."""

import dataclasses
from typing import Literal

import jax
import optax

from superserve_jax.training import fields
from superserve_jax.training.fields import AboveZero, Finite, Fraction


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Args:
      name: "adamw", or "sgd" with Nesterov momentum.
      lr: peak learning rate.
      schedule: "cosine" falls to zero, "constant" stays. Both follow a linear warm-up.
      warmup: length of the warm-up, as a fraction of all steps.
      weight_decay: weight decay, decoupled from the gradient with adamw, added to it with sgd. Norms and biases (parameters
        with fewer than two axes) do not decay.
      momentum: momentum of sgd.
      clip_norm: larger gradients are scaled down to this global norm; 0 does not clip.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: AboveZero = 4e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.05
    weight_decay: Finite = 1e-2
    momentum: Fraction = 0.9
    clip_norm: Finite = 0.0

    def __post_init__(self):
        fields.check(self, "optim.")

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


def _decayed(params: dict[str, jax.Array]) -> dict[str, bool]:
    return {name: value.ndim > 1 for name, value in params.items()}
