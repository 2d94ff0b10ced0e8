"""ViT: the vision transformer (Dosovitskiy et al., ICLR 2021), with the variants DeiT and DINOv2.

The network is plain Flax NNX, and `tracing` makes it elastic. Four things can change: the blocks that a subnet keeps, the
attention heads and the MLP's neurons of each block, and the width. A subnet runs the first heads, neurons and channels. The
width is whole by default, because cutting it costs the most accuracy.

An image is cut into patches. A convolution makes a token of each, and learnt positions are added. Learnt tokens come before
them: the class token, DeiT's distillation token (Touvron et al., ICML 2021), DINOv2's registers (Darcet et al., ICLR 2024).
Published networks also add a position to some of them. Here it is part of the token, because both are learnt.

Axis letters: B batch, H height, W width of an image, C channels, T tokens, D width, K classes.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from superserve_jax import errors
from superserve_jax.lengths import check_ascending
from superserve_jax.tracing.family import ElasticConfig
from superserve_jax.tracing.options import Options

Pool = Literal["token", "tokens", "mean", "mean_norm", "token_mean"]
_FEWEST_TOKENS = {"token": 1, "tokens": 2, "mean": 0, "mean_norm": 0, "token_mean": 1}


@dataclasses.dataclass(frozen=True)
class ViTConfig(ElasticConfig):
    """Sizes and search space of a ViT. The defaults are ViT-B/16 (86.6 M parameters).

    Args:
      num_classes: size of the logits.
      image_size: height and width of the images, in pixels. A multiple of `patch`.
      channels: 1 for grey, 3 for colour.
      patch: height and width of a patch, in pixels.
      widths: allowed widths D, ascending. The last is that of the whole network, a multiple of its number of heads. With one
        value, the width is not elastic.
      depths: allowed numbers of kept blocks, ascending. The last is the number of blocks of the whole network.
      heads: allowed numbers of attention heads of a block, ascending. The last is that number in the whole network.
      mlp: allowed numbers of neurons of a block's MLP, ascending. The last is that number in the whole network.
      tokens: number of learnt tokens before the patches: 1 for a class token, 2 for a distilled DeiT, 5 for a DINOv2 with 4
        registers, 0 for none.
      pool: what the classifier reads. "token": the first token. "tokens": the first two tokens, with a classifier each, whose
        logits are averaged (DeiT). "mean": the mean of the patches. "mean_norm": the same, with the last norm after the mean
        (timm). "token_mean": the first token beside the mean of the patches (DINOv2).
      layer_scale: the first value of LayerScale's factors; 0 for a network without LayerScale.
      eps: epsilon of LayerNorm.
      mean: mean of each channel of the pixels, scaled to 0..1.
      std: standard deviation of each channel of the pixels, scaled to 0..1.

    >>> config = ViTConfig(image_size=32, patch=8, widths=(24,), heads=(1, 2, 3), mlp=(48, 96), depths=(2, 4))
    >>> config.space().size, config.space().subnet(depth=2).gates
    (1332, (1, 0, 1, 0))
    """

    family: ClassVar[str] = "vit"

    num_classes: int = 1000  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride] - the base has a property
    image_size: int = 224
    channels: int = 3
    patch: int = 16
    widths: tuple[int, ...] = (768,)
    depths: tuple[int, ...] = (6, 8, 10, 12)
    heads: tuple[int, ...] = (3, 6, 9, 12)
    mlp: tuple[int, ...] = (768, 1536, 2304, 3072)
    tokens: int = 1
    pool: Pool = "token"
    layer_scale: float = 0.0
    eps: float = 1e-6
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @errors.refusing(errors.ConfigError, "ViTConfig: every field must have the type of its default")
    def __post_init__(self):
        _check(self)

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def options(self) -> Options:
        """What is elastic."""
        depth = {"blocks": self.depths} if self.depths[-1] > 1 else {}  # one block is no stage
        return Options({"heads": self.heads, "expand": self.mlp, "width": self.widths}, depth, rule="every_other")

    def build(self, rngs: nnx.Rngs) -> "ViT":
        """The plain network, freshly initialised."""
        return ViT(self, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape (B, H, W, C) and dtype of raw images."""
        return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, self.channels), jnp.uint8)


class Block(nnx.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut. LayerScale multiplies what is added."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width, neurons = config.widths[-1], config.mlp[-1]
        self.norm1, self.norm2 = _layer_norm(config, rngs), _layer_norm(config, rngs)
        self.attention = nnx.MultiHeadAttention(config.heads[-1], width, width, decode=False, rngs=rngs)
        self.fc1 = nnx.Linear(width, neurons, rngs=rngs)
        self.fc2 = nnx.Linear(neurons, width, rngs=rngs)
        if config.layer_scale:
            self.scale1, self.scale2 = (nnx.Param(jnp.full(width, config.layer_scale, jnp.float32)) for _ in range(2))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The tokens."""
        y = self.attention(self.norm1(x))
        x = x + (y * self.scale1[...] if hasattr(self, "scale1") else y)
        y = self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x + (y * self.scale2[...] if hasattr(self, "scale2") else y)


class ViT(nnx.Module):
    """The network of maximum size."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, window = config.widths[-1], (config.patch, config.patch)
        self.patches = nnx.Conv(config.channels, width, window, window, padding="VALID", rngs=rngs)
        if config.tokens:
            self.tokens = _table(config.tokens, width, rngs)
        self.positions = nnx.Param(_positions(config.image_size // config.patch, width))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depths[-1])])
        self.norm = _layer_norm(config, rngs)
        self.head = nnx.Linear(2 * width if config.pool == "token_mean" else width, config.num_classes, rngs=rngs)
        if config.pool == "tokens":
            self.head2 = nnx.Linear(width, config.num_classes, rngs=rngs)

    def __call__(self, images: UInt8[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Logits of images."""
        config = self.config
        x = (images.astype(jnp.float32) / 255.0 - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        if config.tokens:
            x = jnp.concatenate([jnp.tile(self.tokens[...], (x.shape[0], 1, 1)), x], axis=1)
        for block in self.blocks:
            x = block(x)
        if config.pool == "mean_norm":
            return self.head(self.norm(x[:, config.tokens :].mean(1)))
        x = self.norm(x)
        mean = x[:, config.tokens :].mean(1)
        match config.pool:
            case "token":
                return self.head(x[:, 0])
            case "tokens":
                return (self.head(x[:, 0]) + self.head2(x[:, 1])) / 2
            case "token_mean":
                return self.head(jnp.concatenate([x[:, 0], mean], -1))
            case _:
                return self.head(mean)


def _layer_norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.widths[-1], epsilon=config.eps, use_fast_variance=False, rngs=rngs)


def _table(count: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (1, count, width), jnp.float32))


def _positions(side: int, width: int) -> Float[Array, "1 T D"]:
    """The first values of the positions: sines and cosines of the column and the row (Beyer et al., arXiv 2205.01580).

    Random values would be small beside the patches, and a short training would hardly learn where a patch is. Every four
    channels have one frequency, so that the first channels alone also tell the position.
    """
    count = -(-width // 4)
    frequencies = 100.0 ** -(np.arange(count) / count)
    y, x = (grid.reshape(-1, 1) * frequencies for grid in np.mgrid[:side, :side])
    values = np.stack([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1).reshape(1, side * side, 4 * count)
    return jnp.asarray(values[..., :width], jnp.float32)


def _check(config: ViTConfig) -> None:
    """Raises ConfigError if no network can have this config."""

    def demand(ok: bool, what: str):
        if not ok:
            raise errors.ConfigError(f"ViTConfig: {what}")

    errors.check_name("pool", config.pool, list(_FEWEST_TOKENS))
    for name, least in (("num_classes", 1), ("image_size", 1), ("channels", 1), ("patch", 1), ("tokens", 0)):
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        demand(whole, f"{name} must be a whole number from {least} up, got {value!r}")
    for name in ("widths", "depths", "heads", "mlp"):
        check_ascending(f"ViTConfig: {name}", getattr(config, name), str(getattr(ViTConfig, name)))
    demand(
        config.image_size % config.patch == 0,
        f"image_size must be a multiple of the patch of {config.patch} pixels, got {config.image_size}",
    )
    demand(
        config.widths[-1] % config.heads[-1] == 0,
        f"the largest width must be a multiple of the {config.heads[-1]} heads, got {config.widths[-1]}",
    )
    fewest = _FEWEST_TOKENS[config.pool]
    demand(config.tokens >= fewest, f"pool {config.pool!r} needs at least {fewest} tokens, got tokens={config.tokens}")
    demand(
        math.isfinite(config.layer_scale) and config.layer_scale >= 0,
        f"layer_scale must be 0 or positive, got {config.layer_scale}",
    )
    demand(math.isfinite(config.eps) and config.eps > 0, f"eps must be positive, got {config.eps}")
    for name in ("mean", "std"):
        values = getattr(config, name)
        demand(len(values) == config.channels, f"{name} needs {config.channels} values, one per channel, got {values}")
        demand(all(math.isfinite(v) for v in values), f"{name} must be finite, got {values}")
    demand(all(v > 0 for v in config.std), f"std must be positive, got {config.std}")
