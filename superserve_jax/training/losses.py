"""Losses of the sandwich rule with in-place distillation (Yu and Huang, ICCV 2019), and of hidden states (DynaBERT).

Axis letters: B batch, K classes.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from superserve_jax.supernets.programs import Hidden


def cross_entropy(logits: Float[Array, "B K"], labels: Int[Array, " B"], *, smoothing: float = 0.0) -> Float[Array, ""]:
    """Mean cross entropy of logits against labels.

    >>> round(float(cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))), 4)
    0.6931
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def distillation(logits: Float[Array, "B K"], teacher_logits: Float[Array, "B K"]) -> Float[Array, ""]:
    """Mean cross entropy of logits against the teacher's soft output. No gradient flows to the teacher.

    >>> round(float(distillation(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, 0.0]]))), 4)
    0.6931
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits))
    return optax.softmax_cross_entropy(logits, soft).mean()


def hidden_distance(hidden: Hidden, teacher: Hidden) -> Float[Array, ""]:
    """Mean squared distance between hidden states, over the blocks that the student keeps (Hou et al., NeurIPS 2020, eq. 5).

    No gradient flows to the teacher.

    >>> one, zero, kept = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.float32(1)
    >>> float(hidden_distance(((kept, one), (0 * kept, one)), ((kept, 3 * one), (kept, zero))))
    4.0
    """
    kept = jnp.stack([gate for gate, _ in hidden])
    pairs = zip(hidden, teacher, strict=True)
    distances = [jnp.mean(jnp.square((h - jax.lax.stop_gradient(t)).astype(jnp.float32))) for (_, h), (_, t) in pairs]
    return jnp.sum(kept * jnp.stack(distances)) / jnp.maximum(kept.sum(), 1)
