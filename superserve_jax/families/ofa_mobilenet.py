"""OFA-MobileNetV3: once-for-all's elastic MobileNet v3 (Cai et al., ICLR 2020), for phones and CPUs.

One file because config, network and checks must agree on every size.

The network is plain Flax NNX, and `tracing` makes it elastic. A stem and a first block come before five stages of inverted
residual blocks. These are elastic: the depth of every stage, and the expand ratio and the kernel size of every block. Small
kernels are made of large ones, see `ops.kernel_select`. The first block of a stage always runs. The inner width of
squeeze-and-excite follows the expand ratio. The width of the stages is fixed. Networks of width 1.0 and 1.2 are published.

Axis letters: B batch, H height, W width, C channels, K classes. `h` and `w` are H and W divided by the stride.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from superserve_jax import errors
from superserve_jax.families.ofa_resnet import make_divisible
from superserve_jax.lengths import check_ascending
from superserve_jax.subnet import Subnet
from superserve_jax.tracing.family import ElasticConfig
from superserve_jax.tracing.kernels import kernel_select
from superserve_jax.tracing.options import Options

_DIVISOR = 8
_STEM, _FINAL, _MIX = 16, 960, 1280
_WIDTHS = (24, 40, 80, 112, 160)
_STAGES = range(len(_WIDTHS))
_ACTIVATIONS = (jax.nn.relu, jax.nn.relu, jax.nn.hard_swish, jax.nn.hard_swish, jax.nn.hard_swish)
_SQUEEZES = (False, True, False, True, True)

Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class OFAMobileNetConfig(ElasticConfig):
    """Sizes and search space of an OFA-MobileNetV3. The defaults are the published network of width 1.0 (7.7 M parameters).

    Args:
      num_classes: size of the logits.
      image_size: height and width of the images, in pixels.
      channels: 1 for grey, 3 for colour.
      width_mult: all numbers of channels are multiplied by it.
      kernel_sizes: allowed sizes of a block's kernel, odd and ascending.
      expand_ratios: allowed ratios of a block's inner channels to its input channels, ascending.
      depths: allowed numbers of blocks of a stage, ascending, from 1 up.
      stem_stride: stride of the first convolution.
      strides: stride of each of the 5 stages.
      input_dtype: "uint8" for raw pixels, which the network normalises with `mean` and `std`. "float32" for images that the
        caller has normalised.
      mean: mean of each channel of the pixels, scaled to 0..1.
      std: standard deviation of each channel of the pixels, scaled to 0..1.

    >>> config = OFAMobileNetConfig(image_size=32, width_mult=0.25, depths=(1, 2), kernel_sizes=(3, 5), expand_ratios=(3, 6))
    >>> subnet = config.subnet(kernel_sizes=3, expand_ratios=6, depths=1)
    >>> config.space().size, config.sizes(subnet)["stages.0.0.depthwise.kernel"]
    (3200000, 3)
    """

    family: ClassVar[str] = "ofa_mobilenet"

    num_classes: int = 1000  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride] - the base has a property
    image_size: int = 224
    channels: int = 3
    width_mult: float = 1.0
    kernel_sizes: tuple[int, ...] = (3, 5, 7)
    expand_ratios: tuple[float, ...] = (3.0, 4.0, 6.0)
    depths: tuple[int, ...] = (2, 3, 4)
    stem_stride: int = 2
    strides: tuple[int, ...] = (2, 2, 2, 1, 2)
    input_dtype: Literal["uint8", "float32"] = "uint8"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @errors.refusing(errors.ConfigError, "OFAMobileNetConfig: every field must have the type of its default")
    def __post_init__(self):
        _check(self)

    def width(self, channels: int) -> int:
        """The number of channels that is `channels` at width 1.0."""
        return make_divisible(channels * self.width_mult, _DIVISOR)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all stages."""
        return len(_WIDTHS) * self.depths[-1]

    def path(self, block: int) -> str:
        """The path of a block in the network, such as "stages.0.1"."""
        stage, place = divmod(block, self.depths[-1])
        return f"stages.{stage}.{place}"

    def in_channels(self, block: int) -> int:
        """Channels before a block."""
        stage, place = divmod(block, self.depths[-1])
        return self.width(_WIDTHS[stage] if place else (_STEM, *_WIDTHS)[stage])

    def inner_channels(self, block: int, expand_ratio: float) -> int:
        """Channels of a block's depthwise convolution."""
        return make_divisible(round(self.in_channels(block) * expand_ratio), _DIVISOR)

    @property
    def options(self) -> Options:
        """What is elastic."""
        inner = {f"{self.path(i)}.depthwise": self._inner_sizes(i) for i in range(self.num_blocks)}
        depth = {"*": tuple(d - 1 for d in self.depths)} if self.depths[-1] > 1 else {}
        follows = {"stages.*.squeeze.reduce": ("stages.*.depthwise", squeezed)}
        return Options({"expand": None, "width": None, **inner}, depth, follows=follows)

    def _inner_sizes(self, block: int) -> tuple[int, ...]:
        return tuple(self.inner_channels(block, ratio) for ratio in self.expand_ratios)

    def subnet(
        self,
        *,
        kernel_sizes: int | Sequence[int],
        expand_ratios: float | Sequence[float],
        depths: int | Sequence[int],
    ) -> Subnet:
        """The subnet of these choices.

        Args:
          kernel_sizes, expand_ratios: one for all blocks, or one for each block of the whole network.
          depths: one for all stages, or one for each stage.

        Raises SubnetError if a value is not among the choices.
        """
        count, deepest = self.num_blocks, self.depths[-1]
        kernels = _each("kernel_sizes", kernel_sizes, self.kernel_sizes, count)
        ratios = _each("expand_ratios", expand_ratios, self.expand_ratios, count)
        kept = _each("depths", depths, self.depths, len(_WIDTHS))
        sizes = {}
        for i in range(count):
            path = self.path(i)
            sizes[f"depth {path}"] = int(i % deepest < kept[i // deepest])
            sizes[f"{path}.depthwise"] = self.inner_channels(i, ratios[i])
            sizes[f"{path}.depthwise.kernel"] = int(kernels[i])
        return self.network.subnet(sizes)

    def build(self, rngs: nnx.Rngs) -> "OFAMobileNet":
        """The plain network, freshly initialised."""
        return OFAMobileNet(self, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape (B, H, W, C) and dtype of the raw input."""
        return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, self.channels), jnp.dtype(self.input_dtype))


def squeezed(channels: int) -> int:
    """The inner width of squeeze-and-excite."""
    return make_divisible(channels // 4, _DIVISOR)


class ConvNorm(nnx.Module):
    """A convolution, a norm, and an activation if there is one."""

    def __init__(self, before: int, after: int, size: int, *, stride: int = 1, act: Activation | None = None, rngs: nnx.Rngs):
        half, init = (size // 2, size // 2), nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        window, strides = (size, size), (stride, stride)
        self.conv = nnx.Conv(before, after, window, strides, padding=(half, half), use_bias=False, kernel_init=init, rngs=rngs)
        self.norm = _norm(after, rngs)
        self.act = act

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """The images."""
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class Depthwise(nnx.Module):
    """A depthwise convolution whose kernel has several sizes, a norm, and an activation."""

    def __init__(self, channels: int, sizes: Sequence[int], *, stride: int, act: Activation, rngs: nnx.Rngs):
        largest = sizes[-1]
        init = nnx.initializers.normal((2 / largest**2) ** 0.5)
        self.kernel = nnx.Param(init(rngs.params(), (largest, largest, 1, channels), jnp.float32))
        self.to = nnx.Dict({str(k): nnx.Param(jnp.eye(k * k, dtype=jnp.float32)) for k in sizes[:-1]})
        self.norm = _norm(channels, rngs)
        self.stride, self.act = stride, act

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        """The images."""
        kernel = kernel_select(self.kernel[...], {int(k): matrix[...] for k, matrix in self.to.items()})
        half = kernel.shape[0] // 2
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (self.stride, self.stride),
            ((half, half), (half, half)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=kernel.shape[-1],
        )
        return self.act(self.norm(x))


class SqueezeExcite(nnx.Module):
    """Scales each channel by a number from 0 to 1, which depends on the means of all channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.reduce = nnx.Conv(channels, squeezed(channels), (1, 1), rngs=rngs)
        self.expand = nnx.Conv(squeezed(channels), channels, (1, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The images."""
        y = jax.nn.relu(self.reduce(x.mean((1, 2), keepdims=True)))
        return x * jax.nn.hard_sigmoid(self.expand(y))


class Block(nnx.Module):
    """An inverted residual block. It has a shortcut if it keeps the shape."""

    def __init__(self, config: OFAMobileNetConfig, stage: int, place: int, *, rngs: nnx.Rngs):
        block = stage * config.depths[-1] + place
        before, after = config.in_channels(block), config.width(_WIDTHS[stage])
        inner = config.inner_channels(block, config.expand_ratios[-1])
        act, stride = _ACTIVATIONS[stage], 1 if place else config.strides[stage]
        self.expand = ConvNorm(before, inner, 1, act=act, rngs=rngs)
        self.depthwise = Depthwise(inner, config.kernel_sizes, stride=stride, act=act, rngs=rngs)
        if _SQUEEZES[stage]:
            self.squeeze = SqueezeExcite(inner, rngs=rngs)
        self.project = ConvNorm(inner, after, 1, rngs=rngs)
        self.is_residual = place > 0

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """The images."""
        y = self.depthwise(self.expand(x))
        if hasattr(self, "squeeze"):
            y = self.squeeze(y)
        y = self.project(y)
        return x + y if self.is_residual else y


class FirstBlock(nnx.Module):
    """A depthwise and a 1x1 convolution, beside a shortcut. It is not elastic."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.depthwise = Depthwise(channels, (3,), stride=1, act=jax.nn.relu, rngs=rngs)
        self.project = ConvNorm(channels, channels, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The images."""
        return x + self.project(self.depthwise(x))


class OFAMobileNet(nnx.Module):
    """The network of maximum size."""

    def __init__(self, config: OFAMobileNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        stem, final, act = config.width(_STEM), config.width(_FINAL), jax.nn.hard_swish
        self.stem = ConvNorm(config.channels, stem, 3, stride=config.stem_stride, act=act, rngs=rngs)
        self.first = FirstBlock(stem, rngs=rngs)
        self.stages = nnx.List(
            [nnx.List([Block(config, stage, place, rngs=rngs) for place in range(config.depths[-1])]) for stage in _STAGES]
        )
        self.final = ConvNorm(config.width(_WIDTHS[-1]), final, 1, act=act, rngs=rngs)
        self.mix = nnx.Conv(final, config.width(_MIX), (1, 1), use_bias=False, rngs=rngs)
        self.classifier = nnx.Linear(config.width(_MIX), config.num_classes, rngs=rngs)

    def __call__(self, images: Num[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Logits of images."""
        x, config = images.astype(jnp.float32), self.config
        if config.input_dtype == "uint8":
            x = (x / 255.0 - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)
        x = self.first(self.stem(x))
        for block in itertools.chain(*self.stages):
            x = block(x)
        x = self.final(x).mean((1, 2), keepdims=True)
        return self.classifier(jax.nn.hard_swish(self.mix(x))[:, 0, 0])


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def _each(name: str, value: float | Sequence[float], choices: Sequence[float], count: int) -> Sequence[float]:
    """One value per position, each among the choices."""
    values = [value] * count if isinstance(value, int | float) else list(value)
    if len(values) != count or any(v not in choices for v in values):
        raise errors.SubnetError(f"{name} must be one or {count} of {list(choices)}, got {value!r}")
    return values


def _check(config: OFAMobileNetConfig) -> None:
    """Raises ConfigError if no network can have this config."""

    def demand(ok: bool, what: str):
        if not ok:
            raise errors.ConfigError(f"OFAMobileNetConfig: {what}")

    for name in ("num_classes", "image_size", "channels", "stem_stride"):
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        demand(whole, f"{name} must be a whole number from 1 up, got {value!r}")
    demand(math.isfinite(config.width_mult) and config.width_mult > 0, f"width_mult must be positive, got {config.width_mult}")
    for name in ("kernel_sizes", "depths"):
        check_ascending(f"OFAMobileNetConfig: {name}", getattr(config, name), str(getattr(OFAMobileNetConfig, name)))
    demand(all(k % 2 for k in config.kernel_sizes), f"kernel_sizes must be odd, got {config.kernel_sizes}")
    ratios = config.expand_ratios
    ascending = bool(ratios) and list(ratios) == sorted(set(ratios)) and all(math.isfinite(r) and r > 0 for r in ratios)
    demand(ascending, f"expand_ratios must be positive and ascending, such as (3.0, 4.0, 6.0), got {ratios}")
    stages = len(_WIDTHS)
    whole = len(config.strides) == stages and all(isinstance(s, int) and s >= 1 for s in config.strides)
    demand(whole, f"strides needs {stages} whole numbers from 1 up, got {config.strides}")
    errors.check_name("input_dtype", config.input_dtype, ["uint8", "float32"])
    widths = [config.width(w) for w in (_STEM, *_WIDTHS)]
    alike = [a for a, b, stride in zip(widths, widths[1:], config.strides, strict=False) if a == b and stride == 1]
    demand(not alike, f"with width_mult={config.width_mult}, two stages of stride 1 have {alike} channels; give another one")
    for name in ("mean", "std"):
        values = getattr(config, name)
        demand(len(values) == config.channels, f"{name} needs {config.channels} values, one per channel, got {values}")
        demand(all(math.isfinite(v) for v in values), f"{name} must be finite, got {values}")
    demand(all(v > 0 for v in config.std), f"std must be positive, got {config.std}")
