"""Branches of different operations that are concatenated and merged: Inception blocks, then layers as in DenseNet."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models.case import Case, kept, sizes_of


@dataclasses.dataclass(frozen=True)
class Sizes:
    """For each Inception block: the widths of the 1x1, of the 3x3 and its reduction, and of the pooling branch."""

    width: int = 16
    inception: tuple[tuple[int, int, int, int], ...] = ((8, 8, 16, 8), (16, 8, 8, 4))
    growth: tuple[int, ...] = (8, 16)
    merged: int = 24


class Inception(nnx.Module):
    def __init__(self, width, b1, reduce, b3, pool, *, rngs):
        self.branch1 = nnx.Conv(width, b1, (1, 1), rngs=rngs)
        self.reduce = nnx.Conv(width, reduce, (1, 1), rngs=rngs)
        self.branch3 = nnx.Conv(reduce, b3, (3, 3), rngs=rngs)
        self.pool = nnx.Conv(width, pool, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(b1 + b3 + pool, rngs=rngs)
        self.merge = nnx.Conv(b1 + b3 + pool, width, (1, 1), rngs=rngs)

    def __call__(self, x):
        a = self.branch1(x)
        b = self.branch3(jax.nn.relu(self.reduce(x)))
        c = self.pool(nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME"))
        return x + self.merge(jax.nn.relu(self.norm(jnp.concatenate([a, b, c], axis=-1))))


class DenseLayer(nnx.Module):
    def __init__(self, c_in, growth, *, rngs):
        self.bn = nnx.BatchNorm(c_in, rngs=rngs)
        self.conv = nnx.Conv(c_in, growth, (3, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate([x, self.conv(nnx.relu(self.bn(x)))], -1)


class Branches(nnx.Module):
    def __init__(self, sizes, rngs):
        self.stem = nnx.Conv(3, sizes.width, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.List([Inception(sizes.width, *block, rngs=rngs) for block in sizes.inception])
        c, self.dense = sizes.width, nnx.List([])
        for growth in sizes.growth:
            self.dense.append(DenseLayer(c, growth, rngs=rngs))
            c += growth
        self.transition = nnx.Linear(c, sizes.merged, rngs=rngs)
        self.classifier = nnx.Linear(sizes.merged, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in (*self.blocks, *self.dense):
            x = layer(x)
        return self.classifier(jnp.tanh(self.transition(x.max((1, 2)))))


def shrink(shapes):
    blocks = kept(shapes, r"blocks\.(\d+)\.")
    names = ("branch1", "reduce", "branch3", "pool")
    return Sizes(
        shapes["stem.kernel"][-1],
        tuple(tuple(shapes[f"blocks.{i}.{name}.kernel"][-1] for name in names) for i in blocks),
        sizes_of(shapes, "dense.{}.conv.kernel", kept(shapes, r"dense\.(\d+)\."), -1),
        shapes["transition.kernel"][-1],
    )


CASE = Case(
    name="branches",
    build=Branches,
    sizes=Sizes(),
    shrink=shrink,
    shape=(8, 8, 3),
    blocks=(r"blocks\.(\d+)\.",),
    options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0)}},
)
