"""A small residual network, as a user of Flax NNX writes it, and `ss.elastic` of it."""

from typing import Any

import jax
from flax import nnx

import superserve_jax as ss

SPEC = jax.ShapeDtypeStruct((1, 8), "float32")


class Block(nnx.Module):
    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.fc1 = nnx.Linear(width, inner, rngs=rngs)
        self.fc2 = nnx.Linear(inner, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.fc2(nnx.relu(self.fc1(self.norm(x)))))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 8, inner: int = 16, blocks: int = 3):
        self.stem = nnx.Linear(8, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, inner, rngs=rngs) for _ in range(blocks)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(module: Any = None, **options: Any) -> Any:
    return ss.elastic(module or Net(nnx.Rngs(0)), SPEC, **options)
