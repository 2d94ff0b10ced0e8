"""One training step: gradients of each subnet by its own compiled program, summed, then one update."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from superserve_jax.supernets import programs
from superserve_jax.training import losses, sampling

Params = dict[str, jax.Array]


class SandwichStep:
    """The sandwich rule with in-place distillation: the largest subnet learns the labels, the others its soft output.

    Gradients are jitted per program, so the number of compilations is the number of subnet buckets plus three.

    Args:
      optimiser: an Optax transformation.
      label_smoothing: of the largest subnet's labels.
    """

    def __init__(self, optimiser: optax.GradientTransformation, *, label_smoothing: float = 0.0):
        self.optimiser = optimiser
        self._smoothing = label_smoothing
        self._update = jax.jit(self._apply, donate_argnums=(0, 1))

    def __call__(
        self, params: Params, opt_state: Any, images: np.ndarray, labels: np.ndarray, choices: Sequence[sampling.Choice]
    ) -> tuple[Params, Any, dict[str, jax.Array]]:
        """New parameters, new optimiser state, and scalars: loss of the largest and the smallest, accuracy of the largest.

        `params` and `opt_state` are donated: use what is returned.
        """
        largest, *others = choices
        (loss, logits), grads = _labels_grad(largest.program, self._smoothing, params, images, labels)
        all_grads, all_losses = [grads], [loss]
        for choice in others:
            active = choice.program.active(choice.subnet)
            other_loss, grads = _distill_grad(choice.program, params, images, logits, active)
            all_grads.append(grads)
            all_losses.append(other_loss)
        params, opt_state = self._update(params, opt_state, all_grads)
        accuracy = _accuracy(logits, labels)
        return params, opt_state, {"loss": loss, "loss_smallest": all_losses[1], "accuracy": accuracy}

    def _apply(self, params: Params, opt_state: Any, all_grads: list[Params]) -> tuple[Params, Any]:
        grads = jax.tree.map(lambda *g: sum(g[1:], start=g[0]), *all_grads)
        updates, opt_state = self.optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _labels_grad(program: programs.Program, smoothing: float, params: Params, images: jax.Array, labels: jax.Array):
    def loss_fn(params):
        logits, _ = program.train(params, images, jnp.zeros((0,), jnp.int32))
        return losses.cross_entropy(logits, labels, smoothing=smoothing), logits

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def _distill_grad(program: programs.Program, params: Params, images: jax.Array, teacher: jax.Array, active: jax.Array):
    def loss_fn(params):
        logits, _ = program.train(params, images, active)
        return losses.distillation(logits, teacher)

    return jax.value_and_grad(loss_fn)(params)


@jax.jit
def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) == labels)
