"""OFA-ResNet: once-for-all's elastic ResNet-D (Cai et al., ICLR 2020), the CNN SuperNet of SuperServe.

One file because config, network and checks must agree on every size.

The stem has three 3x3 convolutions and an optional 3x3 max pool. Its middle convolution is a residual layer, which a subnet
may skip. Stages of bottleneck or basic blocks follow, then a linear classifier. The first block of a stage may change the
shape: its shortcut is average pool, 1x1 convolution and norm.

These are elastic: the depth of every stage, the expand ratio of every block, and the width of the stem's two parts and of
every stage. The published OFA-ResNet50 is `OFAResNetConfig()`. A small network for 32x32 images needs only another config.

Axis letters: B batch, H height, W width, C and D channels before and after, K classes. `h` and `w` are H and W divided by the
stride.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

from superserve_jax import errors, layers, ops
from superserve_jax.space import Axis, SearchSpace, check_depths
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import Fold, UnitAxis, Units


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, never more than 10 % below it (MobileNet's rule, which once-for-all uses).

    >>> make_divisible(0.65 * 64, 8), make_divisible(12, 8)
    (40, 16)
    """
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


@dataclasses.dataclass(frozen=True)
class OFAResNetConfig:
    """Sizes and search space of an OFA-ResNet. The defaults are the published OFA-ResNet50 (48 M parameters).

    A stage whose smallest depth is 0 must not change the shape: its stride must be 1, and its width must equal the width
    before it. This stage has no position on the width axis. Every subnet gives it the width of the stage (or stem) before it.

    Args:
      num_classes: size of the logits.
      image_size: height and width of the images, in pixels.
      channels: 1 for grey, 3 for colour.
      block: "bottleneck" (1x1, 3x3, 1x1) or "basic" (3x3, 3x3).
      stem_width: channels of the stem at width 1.0.
      stage_widths: channels of each stage at width 1.0.
      stem_stride: stride of the first convolution.
      stem_pool: whether a 3x3 max pool of stride 2 follows the stem.
      stem_depths: (0, 1) lets subnets skip the stem's residual layer. (1,) always keeps it.
      strides: stride of each stage.
      depths: for each stage, its allowed numbers of blocks, ascending.
      expand_ratios: allowed ratios of a block's inner channels to its output channels.
      width_mults: allowed ratios of the stem's and the stages' channels to their full width.
      divisor: every number of channels is rounded to a multiple of it.
      input_dtype: "uint8" for raw pixels, which the network normalises with `mean` and `std`. "float32" for images that the
        caller has normalised.
      mean: mean of each channel of the pixels, scaled to 0..1.
      std: standard deviation of each channel of the pixels, scaled to 0..1.

    >>> OFAResNetConfig().space().size > 1e12
    True
    """

    family: ClassVar[str] = "ofa_resnet"

    num_classes: int = 1000
    image_size: int = 224
    channels: int = 3
    block: Literal["bottleneck", "basic"] = "bottleneck"
    stem_width: int = 64
    stem_stride: int = 2
    stem_pool: bool = True
    stem_depths: tuple[int, ...] = (0, 1)
    stage_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    depths: tuple[tuple[int, ...], ...] = ((2, 3, 4), (2, 3, 4), (4, 5, 6), (2, 3, 4))
    expand_ratios: tuple[float, ...] = (0.2, 0.25, 0.35)
    width_mults: tuple[float, ...] = (0.65, 0.8, 1.0)
    divisor: int = 8
    input_dtype: Literal["uint8", "float32"] = "uint8"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @errors.refusing(errors.ConfigError, "OFAResNetConfig: every field must have the type of its default")
    def __post_init__(self):
        _check(self)

    def create(self, rngs: nnx.Rngs) -> "OFAResNet":
        """A freshly initialised network of maximum size."""
        return OFAResNet(self, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape (B, H, W, C) and dtype of the raw input."""
        return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, self.channels), jnp.dtype(self.input_dtype))

    def space(self) -> SearchSpace:
        """The search space. Block 0 is the stem's residual layer. The blocks of the stages follow."""
        blocks = tuple(range(1, 1 + sum(d[-1] for d in self.depths)))
        width_positions = 2 + sum(not self._tied(m) for m in range(len(self.depths)))
        expand = Axis("expand", (self.expand_ratios,) * len(blocks), blocks)
        width = Axis("width", (self.width_mults,) * width_positions)
        return SearchSpace((self.stem_depths, *self.depths), (expand, width))

    def _tied(self, stage: int) -> bool:
        """Whether a stage has the width of the stage before it."""
        return self.depths[stage][0] == 0

    def sizes(self, subnet: Subnet) -> dict[str, int]:
        """Channels and gates of a subnet by name. No other code converts ratios to channels."""
        widths = iter(subnet["width"])
        stem = make_divisible(self.stem_width * next(widths), self.divisor)
        sizes = {
            "stem.gate": subnet.gates[0],
            "stem.mid": make_divisible(stem // 2, self.divisor),
            "stem.out": make_divisible(self.stem_width * next(widths), self.divisor),
        }
        out, b = sizes["stem.out"], 0
        for m, (width, depths) in enumerate(zip(self.stage_widths, self.depths, strict=True)):
            out = out if self._tied(m) else make_divisible(width * next(widths), self.divisor)
            sizes[f"stage{m}.out"] = out
            for _ in range(depths[-1]):
                sizes[f"block{b}.gate"] = subnet.gates[1 + b]
                sizes[f"block{b}.mid"] = make_divisible(round(out * subnet["expand"][b]), self.divisor)
                b += 1
        return sizes

    def norm_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """Channels of each norm that a subnet of these sizes runs, in order."""
        return {f"{name}.norm": c_out for name, _, _, c_out, _ in self._convs(sizes)}

    def flops(self, subnet: Subnet) -> int:
        """Multiply-adds per image as once-for-all counts: products with zero padding count, norms and activations do not."""
        sizes = self.sizes(subnet)
        convs = sum(k * k * c_in * c_out * pixels for _, k, c_in, c_out, pixels in self._convs(sizes))
        return convs + sizes[f"stage{len(self.depths) - 1}.out"] * self.num_classes

    def num_params(self, subnet: Subnet) -> int:
        """Number of weights that the subnet needs on its own. Norm scales and biases count, statistics do not."""
        sizes = self.sizes(subnet)
        convs = sum(k * k * c_in * c_out + 2 * c_out for _, k, c_in, c_out, _ in self._convs(sizes))
        return convs + (sizes[f"stage{len(self.depths) - 1}.out"] + 1) * self.num_classes

    def num_vector_params(self, subnet: Subnet) -> int:
        """How many of these weights are in vectors: scale and bias of each norm, and the classifier's bias."""
        return 2 * sum(self.norm_sizes(self.sizes(subnet)).values()) + self.num_classes

    def units(self) -> list[Units]:
        """The inner channels of each block, after each of its convolutions except the last."""
        sizes, found = self.sizes(self.space().largest()), []
        for _, b, _, _ in each_block(self):
            for i in range(2 if self.block == "bottleneck" else 1):
                conv = f"blocks.{b}.convs.{i}"
                writers = ((f"{conv}.conv.kernel", 3), (f"{conv}.norm.scale", 0), (f"{conv}.norm.bias", 0))
                reader = UnitAxis(f"blocks.{b}.convs.{i + 1}.conv.kernel", 2)
                found.append(Units(sizes[f"block{b}.mid"], tuple(UnitAxis(*writer) for writer in writers), (reader,)))
        return found

    def folds(self) -> list[Fold]:
        """All norms, since each follows a convolution."""
        paths = {f"stem{i}": f"stem.{i}" for i in range(3)}
        for _, b, _, has_shortcut in each_block(self):
            paths |= {f"block{b}.conv{i}": f"blocks.{b}.convs.{i}" for i in range(3 if self.block == "bottleneck" else 2)}
            if has_shortcut:
                paths[f"block{b}.shortcut"] = f"blocks.{b}.shortcut"
        return [Fold(f"{n}.norm", f"{p}.conv.kernel", f"{p}.norm.scale", f"{p}.norm.bias") for n, p in paths.items()]

    def _convs(self, sizes: dict[str, int]) -> Iterator[tuple[str, int, int, int, int]]:
        """(name, kernel size, input channels, output channels, output pixels) of every convolution that runs, in order."""
        side = math.ceil(self.image_size / self.stem_stride)
        mid, x = sizes["stem.mid"], sizes["stem.out"]
        yield "stem0", 3, self.channels, mid, side**2
        if sizes["stem.gate"]:
            yield "stem1", 3, mid, mid, side**2
        yield "stem2", 3, mid, x, side**2
        if self.stem_pool:
            side = math.ceil(side / 2)
        for m, b, stride, has_shortcut in each_block(self):
            if not sizes[f"block{b}.gate"]:
                continue
            out, inner = sizes[f"stage{m}.out"], sizes[f"block{b}.mid"]
            small = math.ceil(side / stride)
            if self.block == "bottleneck":
                yield f"block{b}.conv0", 1, x, inner, side**2
                yield f"block{b}.conv1", 3, inner, inner, small**2
                yield f"block{b}.conv2", 1, inner, out, small**2
            else:
                yield f"block{b}.conv0", 3, x, inner, small**2
                yield f"block{b}.conv1", 3, inner, out, small**2
            if has_shortcut:
                yield f"block{b}.shortcut", 1, x, out, small**2
            side, x = small, out


def each_block(config: OFAResNetConfig) -> Iterator[tuple[int, int, int, bool]]:
    """(stage, block, stride, whether the shortcut is a convolution) of every block, in order."""
    b = 0
    for m, depths in enumerate(config.depths):
        for i in range(depths[-1]):
            yield m, b, config.strides[m] if i == 0 else 1, i == 0 and depths[0] > 0
            b += 1


class ConvNorm(nnx.Module):
    """Convolution and SubnetNorm, then ReLU if `relu` is set."""

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, *, name: str, stride: int = 1, relu: bool = True, rngs: nnx.Rngs
    ):
        self.conv = layers.Conv(c_in, c_out, kernel_size, stride=stride, rngs=rngs)
        self.norm = layers.SubnetNorm(c_out, name=f"{name}.norm")
        self.relu = relu

    def __call__(
        self, x: Float[Array, "B H W C"], out: ops.Size, stats: layers.BatchStats | layers.StoredStats
    ) -> Float[Array, "B h w D"]:
        """The output; D is the limit of `out`."""
        x = self.norm(self.conv(x, out), out, stats)
        return jax.nn.relu(x) if self.relu else x


class Block(nnx.Module):
    """A residual block, bottleneck or basic. With `has_shortcut`, its shortcut is an average pool and a `ConvNorm`."""

    def __init__(
        self, kind: str, c_in: int, mid: int, out: int, *, stride: int, has_shortcut: bool, name: str, rngs: nnx.Rngs
    ):
        def conv(i: int, a: int, b: int, kernel_size: int, stride: int = 1, relu: bool = True):
            return ConvNorm(a, b, kernel_size, name=f"{name}.conv{i}", stride=stride, relu=relu, rngs=rngs)

        if kind == "bottleneck":
            convs = [conv(0, c_in, mid, 1), conv(1, mid, mid, 3, stride), conv(2, mid, out, 1, relu=False)]
        else:
            convs = [conv(0, c_in, mid, 3, stride), conv(1, mid, out, 3, relu=False)]
        self.convs = nnx.List(convs)
        self.shortcut = ConvNorm(c_in, out, 1, name=f"{name}.shortcut", relu=False, rngs=rngs) if has_shortcut else None
        self.stride = stride

    def __call__(
        self, x: Float[Array, "B H W C"], mid: ops.Size, out: ops.Size, stats: layers.BatchStats | layers.StoredStats
    ) -> Float[Array, "B h w D"]:
        """The output; D is the limit of `out`."""
        y = x
        for conv in self.convs[:-1]:
            y = conv(y, mid, stats)
        y = self.convs[-1](y, out, stats)
        if self.shortcut is not None:
            x = self.shortcut(average_pool(x, self.stride), out, stats)
        return jax.nn.relu(x + y)


class OFAResNet(nnx.Module):
    """The network of maximum size. A call takes the sizes of a subnet."""

    def __init__(self, config: OFAResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        largest = config.sizes(config.space().largest())
        mid, c = largest["stem.mid"], largest["stem.out"]
        first = ConvNorm(config.channels, mid, 3, stride=config.stem_stride, name="stem0", rngs=rngs)
        second = ConvNorm(mid, mid, 3, name="stem1", rngs=rngs)
        third = ConvNorm(mid, c, 3, name="stem2", rngs=rngs)
        self.stem = nnx.List([first, second, third])
        blocks = []
        for m, b, stride, has_shortcut in each_block(config):
            inner, out = largest[f"block{b}.mid"], largest[f"stage{m}.out"]
            blocks.append(
                Block(config.block, c, inner, out, stride=stride, has_shortcut=has_shortcut, name=f"block{b}", rngs=rngs)
            )
            c = out
        self.blocks = nnx.List(blocks)
        self.classifier = layers.Linear(c, config.num_classes, rngs=rngs)

    def __call__(
        self, images: Num[Array, "B H W C"], sizes: dict[str, ops.Size], stats: layers.BatchStats | layers.StoredStats
    ) -> Float[Array, "B K"]:
        """Logits of images, which have the config's `input_dtype`."""
        config = self.config
        skip = isinstance(stats, layers.StoredStats)
        x = images
        if config.input_dtype == "uint8":
            x = (x.astype(jnp.float32) / 255.0 - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)
        x = x.astype(self.classifier.kernel.dtype)  # the network computes in the dtype of its parameters
        mid = sizes["stem.mid"]
        x = self.stem[0](x, mid, stats)
        x = ops.layer_select(sizes["stem.gate"], lambda x: x + self.stem[1](x, mid, stats), x, skip=skip)
        x = self.stem[2](x, sizes["stem.out"], stats)
        if config.stem_pool:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        for m, b, _, _ in each_block(config):
            block, inner, out = self.blocks[b], sizes[f"block{b}.mid"], sizes[f"stage{m}.out"]
            run = lambda x, block=block, inner=inner, out=out: block(x, inner, out, stats)  # noqa: E731
            gate = sizes[f"block{b}.gate"]
            # A block that changes the shape cannot be dropped: its gate is always on.
            x = run(x) if block.shortcut is not None else ops.layer_select(gate, run, x, skip=skip)
        return self.classifier(jnp.mean(x, (1, 2)), config.num_classes)


def average_pool(x: Float[Array, "B H W C"], window: int) -> Float[Array, "B h w C"]:
    """Average over windows of `window` x `window`. A window that crosses the edge averages only the pixels inside.

    >>> average_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2)[0, :, :, 0].tolist()
    [[2.0, 3.5], [6.5, 8.0]]
    """
    if window == 1:
        return x
    _, h, w, _ = x.shape
    pad = ((0, 0), (0, -h % window), (0, -w % window), (0, 0))
    shape = (1, window, window, 1)
    total = lax.reduce_window(x, 0.0, lax.add, shape, shape, pad)
    count = lax.reduce_window(np.ones((1, h, w, 1), x.dtype), 0.0, lax.add, shape, shape, pad)
    return total / count


def _check(config: OFAResNetConfig) -> None:
    """Raises ConfigError if no network can have this config."""

    def demand(ok: bool, what: str):
        if not ok:
            raise errors.ConfigError(f"OFAResNetConfig: {what}")

    errors.check_name("block", config.block, ["bottleneck", "basic"])
    errors.check_name("input_dtype", config.input_dtype, ["uint8", "float32"])
    for name in ("num_classes", "image_size", "channels", "stem_width", "stem_stride", "divisor"):
        value = getattr(config, name)
        demand(isinstance(value, int) and value >= 1, f"{name} must be a whole number from 1 up, got {value}")
    for name in ("expand_ratios", "width_mults"):
        values = getattr(config, name)
        demand(bool(values) and all(v > 0 and math.isfinite(v) for v in values), f"{name} must be positive, got {values}")
    for name in ("mean", "std"):
        values = getattr(config, name)
        demand(len(values) == config.channels, f"{name} needs {config.channels} values, one per channel, got {values}")
        demand(all(math.isfinite(v) for v in values), f"{name} must be finite, got {values}")
    demand(all(v > 0 for v in config.std), f"std must be positive, got {config.std}")
    demand(config.stem_depths in ((0, 1), (1,)), f"stem_depths must be (0, 1) or (1,), got {config.stem_depths}")
    stages = len(config.depths)
    demand(
        stages >= 1 and stages == len(config.strides) == len(config.stage_widths),
        f"depths, strides and stage_widths need one value per stage, got {stages}, {len(config.strides)} and "
        f"{len(config.stage_widths)}",
    )
    check_depths(config.depths)
    widths = (config.stem_width, *config.stage_widths)
    for m, (before, width) in enumerate(itertools.pairwise(widths)):
        demand(
            config.depths[m][0] > 0 or (config.strides[m] == 1 and width == before),
            f"stage {m} may have depth 0 only if it keeps the shape: stride 1 and width {before}; got stride "
            f"{config.strides[m]} and width {width}",
        )
    config.space()
