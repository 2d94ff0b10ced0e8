"""A family of SuperNets that is not part of the library, in one file."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from superserve_jax import families, layers, ops
from superserve_jax.space import Axis, SearchSpace


@families.register
@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A residual MLP on small grey images. The number of blocks and their common width are elastic."""

    family: ClassVar[str] = "mlp"

    num_classes: int = 10
    image_size: int = 8
    depths: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (8, 16)

    def create(self, rngs):
        return MLP(self, rngs=rngs)

    def input_spec(self, batch):
        return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 1), jnp.uint8)

    def space(self):
        return SearchSpace((self.depths,), (Axis("width", (self.widths,)),))

    def sizes(self, subnet):
        gates = {f"block{i}.gate": gate for i, gate in enumerate(subnet.gates)}
        return {"width": subnet["width"][0], **gates}

    def norm_sizes(self, sizes):
        kept = [f"block{i}" for i in range(self.depths[-1]) if sizes[f"block{i}.gate"]]
        return {name: sizes["width"] for name in ("first", *kept)}

    def flops(self, subnet):
        width = self.sizes(subnet)["width"]
        return width * (self.image_size**2 + sum(subnet.gates) * width + self.num_classes)

    def num_params(self, subnet):
        width, norms = self.sizes(subnet)["width"], 1 + sum(subnet.gates)
        return self.flops(subnet) + 3 * norms * width + self.num_classes


class Layer(nnx.Module):
    def __init__(self, c_in, c_out, *, name, rngs):
        self.linear = layers.Linear(c_in, c_out, rngs=rngs)
        self.norm = layers.SubnetNorm(c_out, name=name)

    def __call__(self, x, width, stats):
        return jax.nn.relu(self.norm(self.linear(x, width), width, stats))


class MLP(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config, width = config, config.widths[-1]
        self.first = Layer(config.image_size**2, width, name="first", rngs=rngs)
        self.blocks = nnx.List([Layer(width, width, name=f"block{i}", rngs=rngs) for i in range(config.depths[-1])])
        self.classifier = layers.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, images, sizes, stats):
        width, skip = sizes["width"], isinstance(stats, layers.StoredStats)
        x = self.first(images.reshape(len(images), -1).astype(jnp.float32) / 255.0, width, stats)
        for i, block in enumerate(self.blocks):
            run = lambda x, block=block: x + block(x, width, stats)  # noqa: E731
            x = ops.layer_select(sizes[f"block{i}.gate"], run, x, skip=skip)
        return self.classifier(x, self.config.num_classes)
