"""One training step: gradients of each subnet by its own compiled program, summed, then one update."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from superserve_jax.supernets.programs import Hidden, Program
from superserve_jax.training import losses
from superserve_jax.training.sampling import Choice

Params = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds.

    Args:
      params: {dotted path: float32 array}.
      opt_state: of the Optax transformation.
      ema: moving average of the parameters; empty where none is kept.
    """

    params: Params
    opt_state: Any
    ema: Params


class Lesson(NamedTuple):
    """What a teacher says of a batch: logits (B, K), and hidden states, empty where they are not asked for."""

    logits: jax.Array
    hidden: Hidden = ()


class Recipe(NamedTuple):
    """The settings of a loss. Hashable, since losses are compiled for them.

    Args:
      smoothing: of the labels.
      teacher_weight: of an outside teacher's soft output in the largest subnet's loss.
      hidden_weight: of the distance between hidden states.
      compute_dtype: name of the dtype that networks compute in.
    """

    smoothing: float = 0.0
    teacher_weight: float = 1.0
    hidden_weight: float = 0.0
    compute_dtype: str = "float32"


class SandwichStep:
    """The sandwich rule: the largest subnet learns the labels, the others its soft output (in-place distillation). With a
    lesson from outside all of them learn that one, the largest beside the labels.

    Gradients are jitted per program, so that in each phase of training the number of compilations is bounded by the number of
    subnet buckets plus four: the largest, the smallest, the update and the accuracy.

    Args:
      optimiser: an Optax transformation.
      recipe: of the losses.
      ema: decay of the parameters' moving average, 0 for none; in the first steps smaller, as (1 + k) / (10 + k).
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
        """The new state, and scalars: loss of the largest and, if there are others, the smallest; accuracy of the largest.

        `state` is donated: use what is returned.

        Args:
          state: parameters and all that goes with them.
          inputs, labels: the batch.
          choices: the largest subnet first, then the smallest and others.
          step: number of steps done before.
          lesson: what an outside teacher says of the batch.
        """
        largest, *others = choices
        (loss, own), grads = _largest_grad(largest.program, self._recipe, state.params, inputs, labels, lesson)
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
def lesson(program: Program, recipe: Recipe, params: Params, inputs: jax.Array, row: jax.Array) -> Lesson:
    """What a teacher, run by the program of its largest subnet with its own statistics, says of a batch.

    Hidden states come from the pass in which the batch normalises itself; families that offer them have no statistics.
    """
    active = jnp.zeros((0,), jnp.int32)
    if recipe.hidden_weight:
        return Lesson(*_forward(program, recipe, params, inputs, active))
    return Lesson(program.infer(params, inputs, row, active))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest_grad(
    program: Program, recipe: Recipe, params: Params, inputs: jax.Array, labels: jax.Array, lesson: Lesson | None
):
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
    """Logits in float32, and hidden states where the recipe asks for them; computed in the recipe's dtype."""
    if recipe.compute_dtype != "float32":  # vectors, which are scales and biases, cost nothing and keep their precision
        params = {name: p.astype(recipe.compute_dtype) if p.ndim > 1 else p for name, p in params.items()}
    if recipe.hidden_weight:
        logits, hidden = program.train_hidden(params, inputs, active)
    else:
        (logits, _), hidden = program.train(params, inputs, active), ()
    return Lesson(logits.astype(jnp.float32), hidden)


@jax.jit
def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) == labels)
