"""A residual network: stages with strides, projections at the start of a stage, and several residual blocks per stage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.case import Case, kept, sizes_of

conv = functools.partial(nnx.Conv, use_bias=False, padding="SAME")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The width of every stage, and for every block of every stage the width between its two convolutions."""

    widths: tuple[int, ...] = (16, 32)
    inner: tuple[tuple[int, ...], ...] = ((16, 24), (32, 16, 24))


class Shortcut(nnx.Module):
    def __init__(self, c_in, c_out, stride, rngs):
        self.conv = conv(c_in, c_out, (1, 1), strides=stride, rngs=rngs)
        self.bn = nnx.BatchNorm(c_out, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    def __init__(self, c_in, inner, c_out, stride, *, rngs):
        self.conv1 = conv(c_in, inner, (3, 3), strides=stride, rngs=rngs)
        self.bn1 = nnx.BatchNorm(inner, rngs=rngs)
        self.conv2 = conv(inner, c_out, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(c_out, rngs=rngs)
        self.shortcut = Shortcut(c_in, c_out, stride, rngs) if stride != 1 or c_in != c_out else None

    def __call__(self, x):
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    def __init__(self, widths, inner, num_classes=6, *, rngs):
        self.stem = conv(1, widths[0], (3, 3), rngs=rngs)
        self.stem_bn = nnx.BatchNorm(widths[0], rngs=rngs)
        stages, c_in = [], widths[0]
        for s, (width, blocks) in enumerate(zip(widths, inner, strict=True)):
            stage = nnx.List([])
            for i, mid in enumerate(blocks):
                stage.append(BasicBlock(c_in, mid, width, 2 if s > 0 and i == 0 else 1, rngs=rngs))
                c_in = width
            stages.append(stage)
        self.stages = nnx.List(stages)
        self.fc = nnx.Linear(c_in, num_classes, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.stem_bn(self.stem((x.astype(jnp.float32) - 127.5) / 64)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2)))


BLOCKS = (r"stages\.0\.(\d+)\.", r"stages\.1\.(\d+)\.")


def shrink(shapes):
    inner = [sizes_of(shapes, f"stages.{s}.{{}}.bn1.scale", kept(shapes, p), 0) for s, p in enumerate(BLOCKS)]
    return Sizes((shapes["stem.kernel"][-1], shapes["fc.kernel"][0]), tuple(inner))


CASE = Case(
    name="resnet",
    build=lambda sizes, rngs: ResNet(sizes.widths, sizes.inner, rngs=rngs),
    sizes=Sizes(),
    shrink=shrink,
    shape=(8, 8, 1),
    dtype="uint8",
    blocks=BLOCKS,
    options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0)}},
)
