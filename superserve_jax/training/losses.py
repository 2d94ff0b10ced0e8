"""Losses of the sandwich rule with in-place distillation (Yu and Huang, ICCV 2019).

Axis letters: B batch, K classes.
"""

import jax
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "B K"], labels: Int[Array, " B"], *, smoothing: float = 0.0) -> Float[Array, ""]:
    """Mean cross entropy of logits against labels.

    >>> import jax.numpy as jnp
    >>> round(float(cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))), 4)
    0.6931
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def distillation(logits: Float[Array, "B K"], teacher_logits: Float[Array, "B K"]) -> Float[Array, ""]:
    """Mean cross entropy of logits against the teacher's soft output, through which no gradient flows.

    >>> import jax.numpy as jnp
    >>> round(float(distillation(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, 0.0]]))), 4)
    0.6931
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits))
    return optax.softmax_cross_entropy(logits, soft).mean()
