"""A multi-layer perceptron on uint8 images. The activation functions are members of an `nnx.Sequential`."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from models.case import Case, kept, sizes_of


@dataclasses.dataclass(frozen=True)
class Sizes:
    hidden: tuple[int, ...] = (32, 24, 16)


class MLP(nnx.Module):
    def __init__(self, hidden=(32, 24, 16), num_classes=5, *, rngs):
        layers, c_in = [], 8 * 8
        for c_out in hidden:
            layers += [nnx.Linear(c_in, c_out, rngs=rngs), nnx.relu]
            c_in = c_out
        self.net = nnx.Sequential(*layers, nnx.Linear(c_in, num_classes, rngs=rngs))

    def __call__(self, images):
        x = images.astype(jnp.float32) / 255.0 - 0.5
        return self.net(x.reshape(x.shape[0], -1))


def shrink(shapes):
    numbers = kept(shapes, r"net\.layers\.(\d+)\.kernel")
    return Sizes(sizes_of(shapes, "net.layers.{}.kernel", numbers[:-1], 1))


CASE = Case(
    name="mlp",
    build=lambda sizes, rngs: MLP(sizes.hidden, rngs=rngs),
    sizes=Sizes(),
    shrink=shrink,
    shape=(8, 8),
    dtype="uint8",
)
