"""Converts classifiers of images: ViT, DeiT and DINOv2 of Hugging Face transformers, and vision transformers of timm."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.convert import choices, positions, state_dict, vit_names
from superserve_jax.convert.state_dict import Source
from superserve_jax.convert.vit_names import Names, Sizes
from superserve_jax.families.vit import Pool, ViTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

_MOST_PATCHES = 1 << 16  # attention over more tokens needs more memory than any machine has
_POSITIONS = "positions of tokens and patches"  # our name for the table in the weights, until it is divided


def vit(
    state: Any,
    *,
    num_heads: int,
    mean: Sequence[float],
    std: Sequence[float],
    pool: Pool | None = None,
    eps: float | None = None,
    image_size: int | None = None,
    depths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    mlp: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
) -> SuperNet:
    """The SuperNet of a state dict of a vision transformer that classifies images.

    These networks are known: `ViTForImageClassification`, `DeiTForImageClassification`,
    `DeiTForImageClassificationWithTeacher`, `Dinov2ForImageClassification` and `Dinov2WithRegistersForImageClassification` of
    Hugging Face, and timm's `vit_*` and `deit*`. The weights show which one it is, and all sizes except the number of heads.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      num_heads: number of attention heads of a block.
      mean, std: mean and standard deviation of each channel of the pixels, scaled to 0..1, with which the network was trained.
      pool: what the classifier reads, see `ViTConfig.pool`. If left out, the weights tell. Only a network of timm with a class
        token, `global_pool="avg"` and `fc_norm=False` needs "mean".
      eps: epsilon of LayerNorm; if left out, the library's value for this network.
      image_size: height and width of the images, in pixels. If left out, those of the weights. Positions are resized for other
        images as the library does it.
      depths: allowed numbers of blocks; if left out, from half of them to all.
      heads: allowed numbers of heads; if left out, quarters of all heads.
      mlp: allowed numbers of neurons of an MLP; if left out, quarters of all neurons.
      widths: allowed widths; if left out, the width is not elastic.

    Returns:
      A SuperNet that takes raw images (B, H, W, C), uint8.

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message names them. Or the network is
        not supported.
      ConfigError: an argument is impossible, or does not fit the weights.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise errors.ConfigError(f"num_heads must be a whole number from 1 up, got {num_heads!r}")
    weights = vit_names.used(state_dict.read(state))
    names = vit_names.names_of(weights)
    sizes = vit_names.sizes_of(weights, names)
    width, patch, depth, neurons = sizes.width or num_heads, sizes.patch or 1, sizes.depth or 1, sizes.neurons or 1
    config = ViTConfig(
        num_classes=sizes.num_classes or 1,
        image_size=(sizes.side or 1) * patch if image_size is None else image_size,
        channels=sizes.channels or len(tuple(mean)),
        patch=patch,
        widths=choices.checked("widths", widths, (width,)),
        depths=choices.checked("depths", depths, choices.upper_half(depth)),
        heads=choices.checked("heads", heads, choices.quarters(num_heads)),
        mlp=choices.checked("mlp", mlp, choices.quarters(neurons)),
        tokens=sizes.tokens,
        pool=names.pools[0] if pool is None else pool,
        layer_scale=1.0 if sizes.has_scales else 0.0,
        eps=names.eps if eps is None else eps,
        mean=tuple(mean),
        std=tuple(std),
    )
    return fill(config, weights)


def fill(config: ViTConfig, weights: Mapping[str, np.ndarray]) -> SuperNet:
    """The SuperNet of `config` with weights from `state_dict.read`. Raises the errors of `vit`."""
    weights = vit_names.used(weights)
    names = vit_names.names_of(weights)
    sizes = vit_names.sizes_of(weights, names)
    if config.pool not in names.pools:  # the shapes of the weights need not reveal the difference
        raise errors.ConfigError(
            f"the classifier of {names.what} has pool={' or '.join(map(repr, names.pools))}, got {config.pool!r}"
        )
    _check_sizes(config, sizes, names)
    if config.patches > _MOST_PATCHES:
        raise errors.ConfigError(
            f"images of {config.image_size}x{config.image_size} pixels have {config.patches:,} patches of {config.patch}x"
            f"{config.patch}, more than {_MOST_PATCHES:,}; give a smaller image_size"
        )
    shapes = {name: spec.shape for name, spec in programs.param_spec(config).items()}
    found = state_dict.take(
        weights,
        _sources(config, shapes, names, sizes),
        what=f"{names.what} of {config.depths[-1]} blocks, width {config.widths[-1]} and {config.mlp[-1]} neurons",
        hint="are they from a classifier of images of these sizes?",
    )
    _divide_projections(found, config)
    _divide_positions(found, config, names, sizes)
    return SuperNet(config, {name: jnp.array(found[name].reshape(shape)) for name, shape in shapes.items()})


def _check_sizes(config: ViTConfig, sizes: Sizes, names: Names) -> None:
    """Raises ConversionError if the weights are of a network with other sizes than the config."""
    state_dict.check_sizes(
        names.what,
        {
            "model.num_classes": (sizes.num_classes, config.num_classes),
            "model.channels": (sizes.channels, config.channels),
            "model.patch": (sizes.patch, config.patch),
            "the largest of model.widths": (sizes.width, config.widths[-1]),
            "the largest of model.depths": (sizes.depth, config.depths[-1]),
            "the largest of model.mlp": (sizes.neurons, config.mlp[-1]),
            "model.tokens": (sizes.tokens, config.tokens),
        },
    )
    if sizes.has_scales != (config.layer_scale > 0):
        needed = "positive" if sizes.has_scales else "0"
        raise errors.ConversionError(
            f"the weights have {'' if sizes.has_scales else 'no '}LayerScale, so model.layer_scale must be {needed}, got "
            f"{config.layer_scale}; change the config, or give other weights"
        )


def _sources(config: ViTConfig, shapes: Mapping[str, tuple[int, ...]], names: Names, sizes: Sizes) -> dict[str, Source]:
    """The source of each parameter. Tables and fused projections are divided later."""
    width = config.widths[-1]
    sources = {}
    for ours, theirs in names.each_layer(config.depths[-1]):
        if ours == "patches":
            kernel, bias, axes = shapes["patches.kernel"], width, (2, 3, 1, 0)
        elif ".norm" in f".{ours}":
            kernel, bias, axes = (width,), width, None
        elif ".attention." in ours:
            bias = 3 * width if ours.endswith("qkv") else width
            kernel, axes = (width, bias), (1, 0)
        else:
            kernel, axes = shapes[f"{ours}.kernel"], (1, 0)
            bias = kernel[1]
        sources[f"{ours}.{'scale' if axes is None else 'kernel'}"] = Source((f"{theirs}.weight",), kernel, axes)
        sources[f"{ours}.bias"] = Source((f"{theirs}.bias",), (bias,))
    if sizes.has_scales:
        for i in range(config.depths[-1]):
            for ours, theirs in zip(("scale1", "scale2"), names.scales, strict=True):
                sources[f"blocks.{i}.{ours}"] = Source((f"{names.blocks}.{i}.{theirs}",), (width,))
    registers = config.tokens - len(names.tokens) + 1  # the last kind of token may have several
    for i, theirs in enumerate(names.tokens):
        count = registers if theirs.rpartition(".")[2].startswith("reg") else 1
        sources[f"tokens.{i}"] = Source((theirs,), (1, count, width))
    side = sizes.side or config.image_size // config.patch
    sources[_POSITIONS] = Source((names.positions,), (1, sizes.with_positions + side**2, width))
    return sources


def _divide_projections(found: dict[str, np.ndarray], config: ViTConfig) -> None:
    """Replaces each fused projection by those of queries, keys and values."""
    for i in range(config.depths[-1]):
        attention = f"blocks.{i}.attention"
        for part in ("kernel", "bias"):
            fused = found.pop(f"{attention}.qkv.{part}", None)
            if fused is not None:
                for name, value in zip(("query", "key", "value"), np.split(fused, 3, axis=-1), strict=True):
                    found[f"{attention}.{name}.{part}"] = value


def _divide_positions(found: dict[str, np.ndarray], config: ViTConfig, names: Names, sizes: Sizes) -> None:
    """Adds positions to the tokens that have one. The others become the patches' positions, resized if necessary."""
    table, count = found.pop(_POSITIONS), sizes.with_positions
    if names.tokens:
        tokens = np.concatenate([found.pop(f"tokens.{i}") for i in range(len(names.tokens))], axis=1)
        tokens[:, :count] += table[:, :count]
        found["tokens"] = tokens
    side = config.image_size // config.patch
    grid = table[:, count:]
    found["positions"] = grid if side == sizes.side else positions.resize(grid, side, antialias=names.antialias)
