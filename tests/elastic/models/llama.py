"""A decoder as in Llama: einsum on own parameters, rotary positions, grouped queries, SwiGLU, and its own RMSNorm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.case import Case, kept, sizes_of

VOCAB, LENGTH = 16, 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """`value_dim` is the size of one head's values. Queries and keys have heads of 8, which the rotation needs."""

    dim: int = 32
    heads: tuple[int, ...] = (4, 4, 4)
    kv_heads: tuple[int, ...] = (2, 2, 4)
    value_dim: tuple[int, ...] = (8, 8, 8)
    hidden: tuple[int, ...] = (48, 64, 32)


def weight(rngs, *shape):
    return nnx.Param(jax.random.normal(rngs.params(), shape) / np.sqrt(shape[0]))


class RMSNorm(nnx.Module):
    def __init__(self, dim, eps=1e-6):
        self.weight, self.eps = nnx.Param(jnp.ones(dim)), eps

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps) * self.weight


def rotate(x):
    """Rotary position embedding of (batch, time, heads, head_dim)."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), 100.0 ** (-np.arange(half) / half)).astype(np.float32)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
    def __init__(self, dim, heads, kv_heads, head_dim, value_dim, *, rngs):
        self.wq = weight(rngs, dim, heads, head_dim)
        self.wk = weight(rngs, dim, kv_heads, head_dim)
        self.wv = weight(rngs, dim, kv_heads, value_dim)
        self.wo = weight(rngs, heads, value_dim, dim)
        self.group = heads // kv_heads

    def __call__(self, x):
        q = rotate(jnp.einsum("btd,dhk->bthk", x, self.wq[...]))
        k = rotate(jnp.einsum("btd,dhk->bthk", x, self.wk[...]))
        v = jnp.einsum("btd,dhk->bthk", x, self.wv[...])
        k, v = jnp.repeat(k, self.group, axis=2), jnp.repeat(v, self.group, axis=2)
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
        causal = jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1])
        probs = jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min))
        return jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqs,bshk->bqhk", probs, v), self.wo[...])


class FeedForward(nnx.Module):
    def __init__(self, dim, hidden, *, rngs):
        self.w1, self.w3 = weight(rngs, dim, hidden), weight(rngs, dim, hidden)
        self.w2 = weight(rngs, hidden, dim)

    def __call__(self, x):
        return (jax.nn.silu(x @ self.w1[...]) * (x @ self.w3[...])) @ self.w2[...]


class Layer(nnx.Module):
    def __init__(self, dim, heads, kv_heads, value_dim, hidden, *, rngs):
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, heads, kv_heads, 8, value_dim, rngs=rngs)
        self.feed_forward = FeedForward(dim, hidden, rngs=rngs)

    def __call__(self, x):
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nnx.Module):
    def __init__(self, args: Sizes, rngs: nnx.Rngs):
        self.embed = weight(rngs, VOCAB, args.dim)
        per_layer = zip(args.heads, args.kv_heads, args.value_dim, args.hidden, strict=True)
        self.layers = nnx.List([Layer(args.dim, *sizes, rngs=rngs) for sizes in per_layer])
        self.norm = RMSNorm(args.dim)
        self.output = weight(rngs, args.dim, VOCAB)

    def __call__(self, tokens):
        h = self.embed[...][tokens]
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)[:, -1] @ self.output[...]


def shrink(shapes):
    layers = kept(shapes, r"layers\.(\d+)\.")
    return Sizes(
        shapes["embed"][1],
        sizes_of(shapes, "layers.{}.attention.wq", layers, 1),
        sizes_of(shapes, "layers.{}.attention.wk", layers, 1),
        sizes_of(shapes, "layers.{}.attention.wv", layers, 2),
        sizes_of(shapes, "layers.{}.feed_forward.w1", layers, 1),
    )


CASE = Case(
    name="llama",
    build=Llama,
    sizes=Sizes(),
    shrink=shrink,
    shape=(LENGTH,),
    dtype="int32",
    vocab=VOCAB,
    blocks=(r"layers\.(\d+)\.",),
    options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0), "head_dim": (0.5, 1.0)}, "rule": "every_other"},
)
