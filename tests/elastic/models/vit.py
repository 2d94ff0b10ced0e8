"""A vision transformer of Flax's own layers: a patch convolution, a class token, positions, and blocks in a list."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from models.case import Case, kept, sizes_of


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 32
    heads: tuple[int, ...] = (4, 4, 2)
    mlp: tuple[int, ...] = (64, 48, 64)


class MlpBlock(nnx.Module):
    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, *, deterministic: bool):
        x = nnx.gelu(self.fc1(x))
        return self.dropout(self.fc2(x), deterministic=deterministic)


class EncoderBlock(nnx.Module):
    def __init__(self, width: int, heads: int, head_dim: int, mlp: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            qkv_features=heads * head_dim,
            out_features=width,
            dropout_rate=0.1,
            decode=False,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.mlp = MlpBlock(width, mlp, rngs)

    def __call__(self, x, *, deterministic: bool):
        x = x + self.attn(self.norm1(x), deterministic=deterministic)
        return x + self.mlp(self.norm2(x), deterministic=deterministic)


class ViT(nnx.Module):
    def __init__(self, *, width=32, heads=(4, 4, 2), head_dim=8, mlp=(64, 48, 64), num_classes=5, rngs: nnx.Rngs):
        self.patches = nnx.Conv(3, width, kernel_size=(4, 4), strides=(4, 4), rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(0.02 * rngs.params.normal((1, 2 * 2 + 1, width)))
        self.blocks = nnx.List([EncoderBlock(width, h, head_dim, m, rngs) for h, m in zip(heads, mlp, strict=True)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images, *, deterministic: bool = True):
        x = self.patches(images)
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([jnp.tile(self.cls[...], (b, 1, 1)), x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x, deterministic=deterministic)
        return self.head(self.norm(x)[:, 0])


def shrink(shapes):
    blocks = kept(shapes, r"blocks\.(\d+)\.")
    return Sizes(
        width=shapes["head.kernel"][0],
        heads=sizes_of(shapes, "blocks.{}.attn.query.kernel", blocks, 1),
        mlp=sizes_of(shapes, "blocks.{}.mlp.fc1.kernel", blocks, 1),
    )


CASE = Case(
    name="vit",
    build=lambda sizes, rngs: ViT(width=sizes.width, heads=sizes.heads, head_dim=8, mlp=sizes.mlp, rngs=rngs),
    sizes=Sizes(),
    shrink=shrink,
    shape=(8, 8, 3),
    blocks=(r"blocks\.(\d+)\.",),
    options={"axes": {"expand": (0.5, 1.0), "width": (0.5, 1.0)}},
)
