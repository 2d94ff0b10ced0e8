"""A causal language model that predicts the next token, with one fused or three separate projections in its attention.

The token embedding also computes the logits. The blocks are numbered attributes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.case import Case, kept, sizes_of

VOCAB, CONTEXT, HEAD_DIM = 20, 6, 8


@dataclasses.dataclass(frozen=True)
class Sizes:
    n_embd: int = 32
    n_head: tuple[int, ...] = (4, 2, 4)
    n_inner: tuple[int, ...] = (48, 64, 32)


class FusedAttention(nnx.Module):
    def __init__(self, n_embd, n_head, rngs):
        self.heads = n_head
        self.c_attn = nnx.Linear(n_embd, 3 * n_head * HEAD_DIM, rngs=rngs)
        self.c_proj = nnx.Linear(n_head * HEAD_DIM, n_embd, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = jnp.split(self.c_attn(x), 3, axis=-1)
        q = q.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3)
        k = k.reshape(b, t, self.heads, -1).transpose(0, 2, 3, 1)
        v = v.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3)
        scores = q @ k / math.sqrt(HEAD_DIM)
        mask = jnp.tril(jnp.ones((t, t), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, self.heads * HEAD_DIM)
        return self.c_proj(y)


class SeparateAttention(nnx.Module):
    def __init__(self, n_embd, n_head, rngs):
        self.heads = n_head
        self.q = nnx.Linear(n_embd, n_head * HEAD_DIM, rngs=rngs)
        self.k = nnx.Linear(n_embd, n_head * HEAD_DIM, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(n_embd, n_head * HEAD_DIM, rngs=rngs)
        self.proj = nnx.Linear(n_head * HEAD_DIM, n_embd, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).reshape(b, t, self.heads, -1) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        scores += jnp.triu(jnp.full((t, t), -jnp.inf), 1)
        y = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores), v)
        return self.proj(y.reshape(b, t, -1))


class Block(nnx.Module):
    def __init__(self, attention, n_embd, n_head, n_inner, rngs):
        self.ln_1 = nnx.LayerNorm(n_embd, rngs=rngs)
        self.attn = attention(n_embd, n_head, rngs)
        self.ln_2 = nnx.LayerNorm(n_embd, rngs=rngs)
        self.fc = nnx.Linear(n_embd, n_inner, rngs=rngs)
        self.proj = nnx.Linear(n_inner, n_embd, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.proj(nnx.gelu(self.fc(self.ln_2(x)), approximate=False))


class GPT(nnx.Module):
    def __init__(self, attention, sizes, rngs):
        self.wte = nnx.Embed(VOCAB, sizes.n_embd, rngs=rngs)
        self.wpe = nnx.Embed(CONTEXT, sizes.n_embd, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.depth = len(sizes.n_head)
        for i, (n_head, n_inner) in enumerate(zip(sizes.n_head, sizes.n_inner, strict=True)):
            setattr(self, f"h{i}", Block(attention, sizes.n_embd, n_head, n_inner, rngs))
        self.ln_f = nnx.LayerNorm(sizes.n_embd, rngs=rngs)

    def __call__(self, tokens, train=False):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        x = self.drop(x, deterministic=not train)
        for i in range(self.depth):
            x = getattr(self, f"h{i}")(x)
        return self.wte.attend(self.ln_f(x)[:, -1])


def shrink(shapes, *, values):
    """`values`: name of the projection whose input is the values of all heads."""
    blocks = kept(shapes, r"h(\d+)\.")
    widths = sizes_of(shapes, f"h{{}}.attn.{values}.kernel", blocks, 0)
    return Sizes(
        shapes["wte.embedding"][1], tuple(w // HEAD_DIM for w in widths), sizes_of(shapes, "h{}.fc.kernel", blocks, 1)
    )


def _case(name, attention, values, **options):
    return Case(
        name=name,
        build=functools.partial(GPT, attention),
        sizes=Sizes(),
        shrink=functools.partial(shrink, values=values),
        shape=(CONTEXT,),
        dtype="int32",
        vocab=VOCAB,
        blocks=(r"h(\d+)\.",),
        options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0)}, **options},
    )


FUSED = _case("gpt_fused", FusedAttention, "c_proj")
SEPARATE = _case("gpt_separate", SeparateAttention, "proj", rule="every_other")
