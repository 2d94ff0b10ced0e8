"""One training step: every subnet's gradients from its own compiled program, their sum, and one update."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from superserve_jax.supernets import programs
from superserve_jax.supernets.programs import Hidden, Program
from superserve_jax.training import losses
from superserve_jax.training.sampling import Choice

Params = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds.

    Args:
      params: {dotted path: float32 array}.
      opt_state: the state of the Optax transformation.
      ema: the moving average of the parameters; empty if none is kept.
    """

    params: Params
    opt_state: Any
    ema: Params


class Lesson(NamedTuple):
    """A teacher's output for a batch: logits (B, K), and hidden states, which are empty if the recipe needs none."""

    logits: jax.Array
    hidden: Hidden = ()


class Recipe(NamedTuple):
    """The settings of the losses. It is a static argument of the compiled functions, so it must be hashable.

    Args:
      smoothing: label smoothing.
      teacher_weight: weight of an outside teacher's soft output in the largest subnet's loss.
      hidden_weight: weight of the distance to the teacher's hidden states, in every loss with a teacher.
      compute_dtype: name of the dtype of activations and products.
    """

    smoothing: float = 0.0
    teacher_weight: float = 1.0
    hidden_weight: float = 0.0
    compute_dtype: str = "float32"


class SandwichStep:
    """The sandwich rule with in-place distillation (Yu and Huang, ICCV 2019).

    The largest subnet learns from the labels, the other subnets from its soft output. With a lesson of an outside teacher,
    every subnet learns from the lesson, and the largest one also from the labels.

    Gradients are jitted for each program. So a phase compiles at most `buckets + 4` functions. These are the gradients of each
    subnet bucket, of the largest and of the smallest subnet, and the update and the accuracy.

    Args:
      optimiser: an Optax transformation.
      recipe: the settings of the losses.
      ema: decay of the parameters' moving average; 0 keeps none. In step k it is at most (1 + k) / (10 + k).
    """

    def __init__(self, optimiser: optax.GradientTransformation, *, recipe: Recipe | None = None, ema: float = 0.0):
        self.optimiser = optimiser
        self._recipe = recipe or Recipe()
        self._ema = ema
        self._update = jax.jit(self._apply, donate_argnums=0)

    def init(self, params: Params) -> TrainState:
        """The state before the first step."""
        ema = {name: jnp.copy(p) for name, p in params.items()} if self._ema else {}
        return TrainState(params, self.optimiser.init(params), ema)

    def __call__(
        self,
        state: TrainState,
        inputs: Any,
        labels: Any,
        choices: Sequence[Choice],
        *,
        step: int = 0,
        lesson: Lesson | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step. `state` is donated, so use the returned state.

        Args:
          state: the state before the step.
          inputs: the inputs (B, ...).
          labels: the labels (B,).
          choices: the subnets to train: the largest, the smallest, then the others.
          step: number of steps done before.
          lesson: the output of an outside teacher for the batch.

        Returns:
          The new state, and the scalars "loss" and "accuracy" of the largest subnet and "loss_smallest".
        """
        largest, *others = choices
        (loss, own), grads = largest_grad(largest.program, self._recipe, state.params, inputs, labels, lesson)
        all_grads, scalars = [grads], {"loss": loss}
        for choice in others:
            active = choice.program.active(choice.subnet)
            other_loss, grads = _other_grad(choice.program, self._recipe, state.params, inputs, active, lesson or own)
            all_grads.append(grads)
            scalars.setdefault("loss_smallest", other_loss)
        state = self._update(state, all_grads, np.float32(step))
        return state, {**scalars, "accuracy": _accuracy(own.logits, labels)}

    def _apply(self, state: TrainState, all_grads: list[Params], step: jax.Array) -> TrainState:
        grads = jax.tree.map(lambda *g: sum(g[1:], start=g[0]), *all_grads)
        updates, opt_state = self.optimiser.update(grads, state.opt_state, state.params)
        params: Params = optax.apply_updates(state.params, updates)  # type: ignore[assignment]
        decay = jnp.minimum(self._ema, (1 + step) / (10 + step))
        ema = {name: decay * old + (1 - decay) * params[name] for name, old in state.ema.items()}
        return TrainState(params, opt_state, ema)


@functools.partial(jax.jit, static_argnums=(0, 1))
def lesson(program: Program, recipe: Recipe, params: Params, inputs: jax.Array, statistics: jax.Array) -> Lesson:
    """A teacher's output for a batch, by the program of its largest subnet with the subnet's own statistics.

    If hidden states are needed, `statistics` is not used: families with hidden states have no SubnetNorm statistics.
    """
    active = jnp.zeros((0,), jnp.int32)
    if recipe.hidden_weight:
        return _forward(program, recipe, params, inputs, active)
    return Lesson(program.infer(params, inputs, statistics, active))


@functools.partial(jax.jit, static_argnums=(0, 1))
def largest_grad(
    program: Program, recipe: Recipe, params: Params, inputs: jax.Array, labels: jax.Array, lesson: Lesson | None
) -> tuple[tuple[jax.Array, Lesson], Params]:
    """((loss, the largest subnet's own output), gradients) of the largest subnet."""

    def loss_fn(params):
        own = _forward(program, recipe, params, inputs, jnp.zeros((0,), jnp.int32))
        loss = losses.cross_entropy(own.logits, labels, smoothing=recipe.smoothing)
        if lesson is not None:
            loss += recipe.teacher_weight * losses.distillation(own.logits, lesson.logits)
            if recipe.hidden_weight:
                loss += recipe.hidden_weight * losses.hidden_distance(own.hidden, lesson.hidden)
        return loss, own

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _other_grad(program: Program, recipe: Recipe, params: Params, inputs: jax.Array, active: jax.Array, lesson: Lesson):
    def loss_fn(params):
        own = _forward(program, recipe, params, inputs, active)
        loss = losses.distillation(own.logits, lesson.logits)
        if recipe.hidden_weight:
            loss += recipe.hidden_weight * losses.hidden_distance(own.hidden, lesson.hidden)
        return loss

    return jax.value_and_grad(loss_fn)(params)


def _forward(program: Program, recipe: Recipe, params: Params, inputs: jax.Array, active: jax.Array) -> Lesson:
    """Float32 logits, and hidden states if the recipe needs them, computed in the recipe's dtype."""
    params = programs.cast(params, recipe.compute_dtype)
    if recipe.hidden_weight:
        logits, hidden = program.train_hidden(params, inputs, active)
    else:
        (logits, _), hidden = program.train(params, inputs, active), ()
    return Lesson(logits.astype(jnp.float32), hidden)


@jax.jit
def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) == labels)
