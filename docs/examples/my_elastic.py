"""A plain ResNet that `ss.elastic` makes a SuperNet of, and an experiment that trains it.

superserve train docs/examples/my_elastic.py --import docs/examples/my_elastic.py
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import superserve_jax as ss
from superserve_jax.training.config import Phase, SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


class Block(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(c_in, c_out, (3, 3), stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(c_out, rngs=rngs)
        self.conv2 = nnx.Conv(c_out, c_out, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(c_out, rngs=rngs)
        self.shortcut = nnx.Conv(c_in, c_out, (1, 1), stride, use_bias=False, rngs=rngs) if c_in != c_out else None

    def __call__(self, x):
        """The output; H and W are divided by the stride."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A small ResNet, as one would write it without superserve_jax."""

    def __init__(self, width: int, depth: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (3, 3), 2, rngs=rngs)
        self.stage1 = nnx.List([Block(width, width, 1, rngs=rngs) for _ in range(depth)])
        self.down = Block(width, 2 * width, 2, rngs=rngs)
        self.stage2 = nnx.List([Block(2 * width, 2 * width, 1, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(2 * width, classes, rngs=rngs)

    def __call__(self, images):
        """Logits (B, classes) of uint8 images (B, H, W, 1)."""
        x = nnx.relu(self.stem(images / 255.0))
        for block in (*self.stage1, self.down, *self.stage2):
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


@ss.elastic.family("my_elastic", axes={"expand": (0.25, 0.5, 1.0)}, depth={"stage1": (1, 2), "stage2": (1, 2)})
@dataclasses.dataclass(frozen=True)
class MyElasticConfig:
    """What builds the network. `ss.elastic.family` adds the search space and everything else."""

    width: int = 16
    depth: int = 2
    num_classes: int = 10

    def build(self, rngs: nnx.Rngs) -> ResNet:
        """The plain network."""
        return ResNet(self.width, self.depth, self.num_classes, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of images."""
        return jax.ShapeDtypeStruct((batch, 32, 32, 1), jnp.uint8)


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="my_elastic",
        model=MyElasticConfig(),
        data=DataConfig(name="cluttered_digits", image_size=32, channels=1, shift=2, cache=True),
        phases=(Phase(share=0.3, elastic=()), Phase(share=0.7, rewire=True)),
        epochs=3,
        buckets=2,
        calibration_examples=1024,
        search=SearchConfig(candidates=6, served=4),
    )
