"""A family of your own in one file: a residual MLP on small grey images. Its depth and its width are elastic.

superserve train docs/examples/my_family.py --import docs/examples/my_family.py
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from superserve_jax import Axis, SearchSpace, Subnet, families, layers, ops
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


@families.register
@dataclasses.dataclass(frozen=True)
class MyConfig:
    """Sizes and search space of the MLP.

    Args:
      num_classes: size of the logits.
      image_size: height and width of the images.
      depths: the numbers of blocks that a subnet may keep.
      widths: the numbers of channels that a subnet may have.
    """

    family: ClassVar[str] = "my_mlp"

    num_classes: int = 10
    image_size: int = 32
    depths: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (32, 64)

    def create(self, rngs: nnx.Rngs) -> "MyNetwork":
        """The network of maximum size, freshly initialised."""
        return MyNetwork(self, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the raw inputs."""
        return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 1), jnp.uint8)

    def space(self) -> SearchSpace:
        """The search space: one stage of blocks, and one width for all of them."""
        return SearchSpace(depths=(self.depths,), axes=(Axis("width", (self.widths,)),))

    def sizes(self, subnet: Subnet) -> dict[str, int]:
        """The width, and a gate for each block."""
        gates = {f"block{i}.gate": gate for i, gate in enumerate(subnet.gates)}
        return {"width": int(subnet["width"][0]), **gates}

    def norm_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """The channels of each norm that runs. A dropped block runs no norm."""
        blocks = [f"block{i}" for i in range(self.depths[-1]) if sizes[f"block{i}.gate"]]
        return {name: sizes["width"] for name in ("first", *blocks)}

    def flops(self, subnet: Subnet) -> int:
        """Multiply-adds of one image."""
        width, blocks = self.sizes(subnet)["width"], sum(subnet.gates)
        return width * (self.image_size**2 + blocks * width + self.num_classes)

    def num_params(self, subnet: Subnet) -> int:
        """Number of weights that the subnet needs on its own."""
        width, norms = self.sizes(subnet)["width"], 1 + sum(subnet.gates)
        return self.flops(subnet) + 3 * norms * width + self.num_classes  # a bias, and scale and bias of the norm


class Layer(nnx.Module):
    """Linear, SubnetNorm and ReLU."""

    def __init__(self, c_in: int, c_out: int, *, name: str, rngs: nnx.Rngs):
        self.linear = layers.Linear(c_in, c_out, rngs=rngs)
        self.norm = layers.SubnetNorm(c_out, name=name)

    def __call__(self, x, width: ops.Size, stats):
        """The output (B, width)."""
        return jax.nn.relu(self.norm(self.linear(x, width), width, stats))


class MyNetwork(nnx.Module):
    """The network of maximum size. A call takes the sizes of a subnet."""

    def __init__(self, config: MyConfig, *, rngs: nnx.Rngs):
        self.config, width = config, config.widths[-1]
        self.first = Layer(config.image_size**2, width, name="first", rngs=rngs)
        self.blocks = nnx.List([Layer(width, width, name=f"block{i}", rngs=rngs) for i in range(config.depths[-1])])
        self.classifier = layers.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, images, sizes: dict[str, ops.Size], stats):
        """Logits (B, num_classes) of uint8 images (B, H, W, 1)."""
        width, skip = sizes["width"], isinstance(stats, layers.StoredStats)
        x = self.first(images.reshape(images.shape[0], -1) / 255.0, width, stats)
        for i, block in enumerate(self.blocks):
            x = ops.layer_select(sizes[f"block{i}.gate"], lambda x, b=block: x + b(x, width, stats), x, skip=skip)
        return self.classifier(x, self.config.num_classes)


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="my_family",
        model=MyConfig(),
        data=DataConfig(name="cluttered_digits", image_size=32, channels=1, shift=2, cache=True),
        epochs=3,
        buckets=2,
        calibration_examples=1024,
        search=SearchConfig(candidates=6, served=4),
    )
