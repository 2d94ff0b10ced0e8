"""A transformer encoder whose layers are stacked: every parameter has a leading layer axis, and `jax.lax.scan` runs them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models.case import Case

VOCAB, HEAD_DIM = 12, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    layers: int = 3
    d_model: int = 16
    heads: int = 4
    d_ff: int = 32


def normalize(x, scale, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


class Stacked(nnx.Module):
    def __init__(self, sizes, rngs):
        n, d, f, inner = sizes.layers, sizes.d_model, sizes.d_ff, sizes.heads * HEAD_DIM
        normal = lambda *shape: nnx.Param(rngs.params.normal(shape) * shape[-2] ** -0.5)  # noqa: E731
        self.embed, self.positions = normal(VOCAB, d), normal(8, d)
        self.qkv, self.qkv_bias = normal(n, d, 3, inner), nnx.Param(jnp.zeros((n, 3, inner)))
        self.out = normal(n, inner, d)
        self.up, self.up_bias = normal(n, d, f), nnx.Param(jnp.zeros((n, f)))
        self.down, self.down_bias = normal(n, f, d), nnx.Param(jnp.zeros((n, d)))
        self.scale, self.bias = nnx.Param(jnp.ones((n, 2, d))), nnx.Param(jnp.zeros((n, 2, d)))
        self.classifier = nnx.Linear(d, 4, rngs=rngs)
        self.heads = sizes.heads

    def layer(self, x, p):
        b, t, _ = x.shape
        y = normalize(x, p["scale"][0], p["bias"][0])
        qkv = jnp.einsum("btd,dcf->cbtf", y, p["qkv"]) + p["qkv_bias"][:, None, None]
        q, k, v = qkv.reshape(3, b, t, self.heads, HEAD_DIM)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.5)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, -1) @ p["out"]
        y = jax.nn.gelu(normalize(x, p["scale"][1], p["bias"][1]) @ p["up"] + p["up_bias"])
        return x + y @ p["down"] + p["down_bias"], None

    def __call__(self, tokens):
        names = ("qkv", "qkv_bias", "out", "up", "up_bias", "down", "down_bias", "scale", "bias")
        x = self.embed[...][tokens] + self.positions[...]
        x, _ = jax.lax.scan(self.layer, x, {name: getattr(self, name)[...] for name in names})
        return self.classifier(x.mean(axis=1))


def shrink(shapes):
    layers, d_model, d_ff = shapes["up"]
    return Sizes(layers, d_model, shapes["out"][1] // HEAD_DIM, d_ff)


CASE = Case(
    name="scanned",
    build=Stacked,
    sizes=Sizes(),
    shrink=shrink,
    shape=(8,),
    dtype="int32",
    vocab=VOCAB,
    options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0)}},
)
