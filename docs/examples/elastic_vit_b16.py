"""ViT-B/16 in plain Flax NNX, made elastic: 86.6 M parameters, and subnets down to 12.2 M.

superserve train docs/examples/elastic_vit_b16.py --import docs/examples/elastic_vit_b16.py --data.path ~/pets
python serve/bench/start.py docs/examples/elastic_vit_b16.py --import docs/examples/elastic_vit_b16.py
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import superserve_jax as ss
from superserve_jax.training.config import OptimConfig, SearchConfig, TrainConfig
from superserve_jax.training.data import FolderConfig


class Block(nnx.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, mlp: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.fc1 = nnx.Linear(width, mlp, rngs=rngs)
        self.fc2 = nnx.Linear(mlp, width, rngs=rngs)

    def __call__(self, x):
        """The tokens (B, T, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """A vision transformer (Dosovitskiy et al., ICLR 2021), whose class token makes the logits."""

    def __init__(self, config: "ViTConfig", *, rngs: nnx.Rngs):
        tokens, patch = (config.image_size // config.patch) ** 2, (config.patch, config.patch)
        self.patches = nnx.Conv(3, config.width, patch, patch, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, config.width)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens + 1, config.width)))
        self.blocks = nnx.List([Block(config.width, config.heads, config.mlp, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(config.width, config.num_classes, rngs=rngs)

    def __call__(self, images):
        """Logits (B, classes) of uint8 images (B, H, W, 3)."""
        x = self.patches(images / 127.5 - 1.0)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@ss.elastic.family("elastic_vit", depth={"blocks": (6, 8, 10, 12)}, rule="every_other")
@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of the whole network. The defaults are ViT-B/16."""

    num_classes: int = 1000
    image_size: int = 224
    patch: int = 16
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    depth: int = 12

    def build(self, rngs: nnx.Rngs) -> ViT:
        """The plain network."""
        return ViT(self, rngs=rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of images."""
        return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 3), jnp.uint8)


def get_config() -> TrainConfig:
    """The experiment, for a folder of images."""
    return TrainConfig(
        name="elastic_vit",
        model=ViTConfig(),
        data=FolderConfig(image_size=224, channels=3, shift=16, flip=True),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1),
        epochs=30,
        batch_size=64,
        search=SearchConfig(candidates=30, served=6),
    )
