"""Losses of the sandwich rule with in-place distillation (Yu and Huang, ICCV 2019)."""

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Mean cross entropy of logits (B, K) against int labels (B,), a scalar.

    >>> float(cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1])).round(4))
    0.6931
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def distillation(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Mean cross entropy of logits (B, K) against the teacher's soft output (B, K), through which no gradient flows.

    >>> float(distillation(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, 0.0]])).round(4))
    0.6931
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits))
    return optax.softmax_cross_entropy(logits, soft).mean()
