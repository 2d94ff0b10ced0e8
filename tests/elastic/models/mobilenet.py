"""Inverted residuals as in MobileNet v3: depthwise convolutions, squeeze-and-excite, BatchNorm, relu6 and hard swish."""

import dataclasses

import jax
from flax import nnx

from models.case import Case, kept


@dataclasses.dataclass(frozen=True)
class Block:
    """Sizes of one inverted residual block."""

    inner: int
    squeeze: int
    width: int
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    stem: int = 16
    blocks: tuple[Block, ...] = (Block(32, 8, 16), Block(48, 12, 24, 2), Block(64, 8, 24))
    head: int = 32


class ConvBNAct(nnx.Sequential):
    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, act=jax.nn.relu6, *, rngs):
        super().__init__(
            nnx.Conv(c_in, c_out, (kernel, kernel), stride, feature_group_count=groups, use_bias=False, rngs=rngs),
            nnx.BatchNorm(c_out, momentum=0.9, epsilon=1e-3, rngs=rngs),
            act,
        )


class SqueezeExcite(nnx.Module):
    def __init__(self, channels, squeeze, *, rngs):
        self.reduce = nnx.Conv(channels, squeeze, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(squeeze, channels, (1, 1), rngs=rngs)

    def __call__(self, x):
        gate = x.mean(axis=(1, 2), keepdims=True)
        return x * jax.nn.hard_sigmoid(self.expand(jax.nn.relu(self.reduce(gate))))


class InvertedResidual(nnx.Module):
    def __init__(self, c_in, block, *, rngs):
        self.expand = ConvBNAct(c_in, block.inner, 1, rngs=rngs)
        self.depthwise = ConvBNAct(
            block.inner, block.inner, 3, block.stride, groups=block.inner, act=jax.nn.hard_swish, rngs=rngs
        )
        self.se = SqueezeExcite(block.inner, block.squeeze, rngs=rngs)
        self.project = nnx.Conv(block.inner, block.width, (1, 1), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(block.width, rngs=rngs)
        self.residual = block.stride == 1 and c_in == block.width

    def __call__(self, x):
        y = self.norm(self.project(self.se(self.depthwise(self.expand(x)))))
        return x + y if self.residual else y


class MobileNet(nnx.Module):
    def __init__(self, sizes, rngs):
        self.stem = ConvBNAct(3, sizes.stem, 3, act=jax.nn.hard_swish, rngs=rngs)
        self.blocks, c_in = nnx.List([]), sizes.stem
        for block in sizes.blocks:
            self.blocks.append(InvertedResidual(c_in, block, rngs=rngs))
            c_in = block.width
        self.head = ConvBNAct(c_in, sizes.head, 1, act=jax.nn.hard_swish, rngs=rngs)
        self.classifier = nnx.Linear(sizes.head, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.avg_pool(self.head(x), (4, 4))
        return self.classifier(x[:, 0, 0, :])


def shrink(shapes):
    blocks = []
    for i in kept(shapes, r"blocks\.(\d+)\."):
        squeeze, width = (shapes[f"blocks.{i}.{name}.kernel"][-1] for name in ("se.reduce", "project"))
        blocks.append(Block(shapes[f"blocks.{i}.project.kernel"][-2], squeeze, width, STRIDES[i]))
    return Sizes(shapes["stem.layers.0.kernel"][-1], tuple(blocks), shapes["classifier.kernel"][0])


STRIDES = [block.stride for block in Sizes().blocks]
CASE = Case(
    name="mobilenet",
    build=MobileNet,
    sizes=Sizes(),
    shrink=shrink,
    shape=(8, 8, 3),
    blocks=(r"blocks\.(\d+)\.",),
    options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0)}},
)
