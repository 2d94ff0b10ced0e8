"""OFA-ResNet in plain Flax NNX, with a search space of its own: an inner width depends on the width of its stage.

The same networks as the family `ofa_resnet`, with the same names of parameters. tests/elastic/test_plain_resnet.py compares
the two, and serve/bench/plain_families.py compares their speed. docs/elastic.md explains `space` and `sizes`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import superserve_jax as ss
from superserve_jax.families.ofa_resnet import OFAResNetConfig, average_pool, each_block
from superserve_jax.training.config import TrainConfig, load_config


class ConvNorm(nnx.Module):
    """A convolution and a norm, which computes in float32; then an addition and an activation, if wanted."""

    def __init__(self, before: int, after: int, size: int, *, stride: int = 1, relu: bool = True, adds: bool = False, rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        window, half, strides = (size, size), ((size // 2, size // 2),) * 2, (stride, stride)
        self.conv = nnx.Conv(before, after, window, strides, padding=half, use_bias=False, kernel_init=init, rngs=rngs)
        self.norm = nnx.BatchNorm(after, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.relu, self.adds = relu, adds

    def __call__(self, x):
        """The images (B, H, W, before)."""
        y = self.conv(x)
        y = self.norm(y).astype(y.dtype)
        y = jax.nn.relu(y) if self.relu else y
        return x + y if self.adds else y


class Block(nnx.Module):
    """A residual block, bottleneck or basic. A block that changes the shape has a convolution in its shortcut."""

    def __init__(self, kind: str, before: int, inner: int, after: int, *, stride: int, has_shortcut: bool, rngs):
        sizes = [(inner, 1, 1), (inner, 3, stride)] if kind == "bottleneck" else [(inner, 3, stride)]
        sizes.append((after, 1 if kind == "bottleneck" else 3, 1))
        channels = [before, *(channels for channels, _, _ in sizes)]
        self.convs = nnx.List(
            [
                ConvNorm(channels[i], out, size, stride=step, relu=i + 1 < len(sizes), rngs=rngs)
                for i, (out, size, step) in enumerate(sizes)
            ]
        )
        self.shortcut = ConvNorm(before, after, 1, relu=False, rngs=rngs) if has_shortcut else None
        self.stride = stride

    def __call__(self, x):
        """The images (B, H, W, before)."""
        y = x
        for conv in self.convs:
            y = conv(y)
        shortcut = x if self.shortcut is None else self.shortcut(average_pool(x, self.stride))
        return jax.nn.relu(shortcut + y)


class ResNet(nnx.Module):
    """The network of maximum size."""

    def __init__(self, config: OFAResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        largest = config.sizes(config.space().largest())
        middle, channels = largest["stem.mid"], largest["stem.out"]
        first = ConvNorm(config.channels, middle, 3, stride=config.stem_stride, rngs=rngs)
        second = ConvNorm(middle, middle, 3, adds=True, rngs=rngs)
        self.stem = nnx.List([first, second, ConvNorm(middle, channels, 3, rngs=rngs)])
        blocks = []
        for stage, b, stride, has_shortcut in each_block(config):
            inner, out = largest[f"block{b}.mid"], largest[f"stage{stage}.out"]
            blocks.append(Block(config.block, channels, inner, out, stride=stride, has_shortcut=has_shortcut, rngs=rngs))
            channels = out
        self.blocks = nnx.List(blocks)
        self.classifier = nnx.Linear(channels, config.num_classes, rngs=rngs)

    def __call__(self, images):
        """Logits (B, classes) of uint8 images (B, H, W, channels)."""
        config = self.config
        x = (images.astype(jnp.float32) / 255.0 - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)
        for layer in self.stem:
            x = layer(x)
        if config.stem_pool:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jnp.mean(x, (1, 2)))


@ss.elastic.family("plain_ofa_resnet", axes={"*": (0.5, 1.0)}, depth={"*": (0,)})
@dataclasses.dataclass(frozen=True)
class PlainOFAResNetConfig:
    """An OFA-ResNet as a plain module.

    Args:
      model: the sizes and the search space.
    """

    model: OFAResNetConfig = dataclasses.field(default_factory=OFAResNetConfig)

    def build(self, rngs: nnx.Rngs) -> ResNet:
        """The plain network."""
        return ResNet(self.model, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the raw images."""
        return self.model.input_spec(batch)

    def space(self) -> ss.SearchSpace:
        """The search space of once-for-all."""
        return self.model.space()

    def sizes(self, subnet: ss.Subnet) -> dict[str, int]:
        """The sizes of a subnet, by the names that `self.found` has for axes and blocks."""
        ours = self.model.sizes(subnet)
        stages = {b: f"stage{m}.out" for m, b, _, _ in each_block(self.model)}
        sizes = {}
        for axis in self.found.axes:
            first, number, part, *_ = axis.name.split(".")
            if first == "stem":
                sizes[axis.name] = ours["stem.mid" if number == "0" else "stem.out"]
            else:
                sizes[axis.name] = ours[stages[int(number)] if part == "shortcut" else f"block{number}.mid"]
        for block in self.network.blocks:
            sizes[f"depth {block}"] = ours["stem.gate" if block == "stem.1" else f"block{block.split('.')[1]}.gate"]
        return sizes


def get_config() -> TrainConfig:
    """The experiment of configs/ofa_resnet50.py, with the plain module."""
    hand = load_config("ofa_resnet50")
    return dataclasses.replace(hand, name="plain_ofa_resnet", model=PlainOFAResNetConfig(hand.model))
