"""The names and shapes that Hugging Face and timm give the weights of a vision transformer."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from superserve_jax import errors
from superserve_jax.families.vit import Pool

_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_HF_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_MLP = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_HF_MLP = {"fc1": "intermediate.dense", "fc2": "output.dense"}
_HF_ATTENTION = {
    **{f"attention.{name}": f"attention.attention.{name}" for name in ("query", "key", "value")},
    "attention.out": "attention.output.dense",
}
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}  # of transformers 5, in memory
_NEW_HF_ATTENTION = {f"attention.{ours}": f"attention.{theirs}" for ours, theirs in _PROJECTIONS.items()}
_TIMM_BLOCK = {**_NORMS, "attention.qkv": "attn.qkv", "attention.out": "attn.proj", **_MLP}
_UNUSED = "mask_token"  # a classifier never reads it


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of one network's weights.

    Args:
      what: the network, for messages.
      layers: {our layer outside of the blocks: its name}. A layer has a weight and a bias.
      block: {our layer in a block: its name in the block}.
      blocks: the path of the list of blocks.
      scales: the names of LayerScale's factors in a block.
      tokens: the learnt tokens, in their order.
      positions: the table of positions.
      with_positions: how many tokens have a position in this table. None: all or none, as its length tells.
      eps: the library's epsilon of LayerNorm for this network.
      pools: what the library's classifier may read, see `ViTConfig.pool`.
      antialias: whether the library resizes positions with antialiasing.
    """

    what: str
    layers: Mapping[str, str]
    block: Mapping[str, str]
    blocks: str
    scales: tuple[str, str]
    tokens: tuple[str, ...]
    positions: str
    with_positions: int | None
    eps: float
    pools: tuple[Pool, ...]
    antialias: bool

    def each_layer(self, depth: int) -> Iterator[tuple[str, str]]:
        """(our name, their name) of each layer with a weight and a bias."""
        yield from self.layers.items()
        for i in range(depth):
            yield from ((f"blocks.{i}.{ours}", f"{self.blocks}.{i}.{theirs}") for ours, theirs in self.block.items())


def names_of(weights: Mapping[str, np.ndarray]) -> Names:
    """The names that fit a state dict. If none do, those of timm; the missing weights are named later."""
    prefixes = {name.partition(".")[0] for name in weights}
    for prefix in ("vit", "deit", "dinov2", "dinov2_with_registers"):
        if prefix in prefixes:
            return _hugging_face(prefix, weights)
    return _timm(weights)


def used(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights that a classifier reads. Raises ConversionError for a gated MLP."""
    if gated := next((name for name in weights if re.search(r"\.mlp\.(weights_in|gate_proj|w12|w1|fc1_g)\.", name)), None):
        raise errors.ConversionError(
            f"the weights have gated MLPs (SwiGLU), such as '{gated}'. They are not supported; give a network whose MLPs have "
            "two layers, such as DINOv2 up to the size large"
        )
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] != _UNUSED}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that some weights show; None for a size that no weight shows.

    Args:
      num_classes, channels, patch, width, depth, neurons: as in `ViTConfig`.
      tokens: the number of learnt tokens.
      side: rows and columns of the grid of patches.
      with_positions: how many tokens have a position.
      has_scales: whether the network has LayerScale.
    """

    num_classes: int | None
    channels: int | None
    patch: int | None
    width: int | None
    depth: int | None
    neurons: int | None
    tokens: int
    side: int | None
    with_positions: int
    has_scales: bool


def sizes_of(weights: Mapping[str, np.ndarray], names: Names) -> Sizes:
    """The sizes of a network. Raises ConversionError if its patches form no square."""

    def length(name: str, axis: int) -> int | None:
        shape = weights[name].shape if name in weights else ()
        return shape[axis] or None if axis < len(shape) else None

    kernel, first = f"{names.layers['patches']}.weight", f"{names.blocks}.0"
    numbers = {m[1] for m in (re.match(rf"{re.escape(names.blocks)}\.(\d+)\.", name) for name in weights) if m}
    depth = next(i for i in itertools.count() if str(i) not in numbers)
    tokens = sum(length(name, 1) or 1 for name in names.tokens)
    side, with_positions = _grid(length(names.positions, 1), tokens, names)
    return Sizes(
        num_classes=length(f"{names.layers['head']}.weight", 0),
        channels=length(kernel, 1),
        patch=length(kernel, 2),
        width=length(kernel, 0),
        depth=depth or None,
        neurons=length(f"{first}.{names.block['fc1']}.weight", 0),
        tokens=tokens,
        side=side,
        with_positions=with_positions,
        has_scales=f"{first}.{names.scales[0]}" in weights,
    )


def _grid(positions: int | None, tokens: int, names: Names) -> tuple[int | None, int]:
    """(rows of the grid of patches, how many tokens have a position)."""
    possible = (tokens, 0) if names.with_positions is None else (names.with_positions,)
    if "reg_token" in names.tokens:  # 9 positions may be 3 x 3, or 5 tokens and 2 x 2. Networks with registers have the first
        possible = possible[::-1]
    if positions is None:
        return None, possible[0]
    for count in possible:
        if positions > count and math.isqrt(positions - count) ** 2 == positions - count:
            return math.isqrt(positions - count), count
    raise errors.ConversionError(
        f"'{names.positions}' has {positions} positions, of which {' or '.join(map(str, possible))} belong to tokens. The "
        "others must form a square, because only square images are supported"
    )


def _hugging_face(prefix: str, weights: Mapping[str, np.ndarray]) -> Names:
    """The names in files, or those in the memory of transformers 5, which `save_pretrained` replaces."""
    is_new = any(".q_proj." in name for name in weights)
    is_dino, has_teacher = prefix.startswith("dinov2"), "cls_classifier.weight" in weights
    heads = {"head": "cls_classifier", "head2": "distillation_classifier"} if has_teacher else {"head": "classifier"}
    embeddings = f"{prefix}.embeddings"
    extra = {"deit": ("distillation_token",), "dinov2_with_registers": ("register_tokens",)}.get(prefix, ())
    kind = {"vit": "ViT", "deit": "DeiT"}.get(prefix, "DINOv2")
    return Names(
        what=f"Hugging Face's {kind}",
        layers={"patches": f"{embeddings}.patch_embeddings.projection", "norm": f"{prefix}.layernorm", **heads},
        block={
            **(_NORMS if is_dino else _HF_NORMS),
            **(_NEW_HF_ATTENTION if is_new else _HF_ATTENTION),
            **(_MLP if is_dino or is_new else _HF_MLP),
        },
        blocks=f"{prefix}.layers" if is_new and not is_dino else f"{prefix}.encoder.layer",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        tokens=tuple(f"{embeddings}.{name}" for name in ("cls_token", *extra)),
        positions=f"{embeddings}.position_embeddings",
        with_positions=2 if prefix == "deit" else 1,
        eps=1e-6 if is_dino else 1e-12,
        pools=("token_mean",) if is_dino else ("tokens",) if has_teacher else ("token",),
        antialias=prefix == "dinov2_with_registers",
    )


def _timm(weights: Mapping[str, np.ndarray]) -> Names:
    tokens = tuple(name for name in ("cls_token", "dist_token", "reg_token") if name in weights)
    has_fc_norm, has_two_heads = "fc_norm.weight" in weights, "head_dist.weight" in weights
    pools: tuple[Pool, ...] = ("token", "mean") if "cls_token" in tokens else ("mean",)
    pools = ("tokens",) if has_two_heads else ("mean_norm",) if has_fc_norm else pools
    return Names(
        what="timm's vision transformer",
        layers={
            "patches": "patch_embed.proj",
            "norm": "fc_norm" if has_fc_norm else "norm",
            "head": "head",
            **({"head2": "head_dist"} if has_two_heads else {}),
        },
        block=_TIMM_BLOCK,
        blocks="blocks",
        scales=("ls1.gamma", "ls2.gamma"),
        tokens=tokens,
        positions="pos_embed",
        with_positions=None,
        eps=1e-6,
        pools=pools,
        antialias=True,
    )
