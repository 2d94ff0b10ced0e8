"""DynaBERT in plain Flax NNX: the same networks as the family `dynabert`, with the same names of parameters.

tests/elastic/test_plain_dynabert.py compares the two, and serve/bench/plain_families.py compares their speed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import superserve_jax as ss
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training.config import TrainConfig, load_config


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: DynaBERTConfig, *, rngs: nnx.Rngs):
        counts = (config.vocab_size, config.max_length, config.token_types)
        self.words, self.positions, self.types = (
            nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (count, config.hidden_size))) for count in counts
        )
        self.norm = _norm(config, rngs)

    def __call__(self, ids, types):
        """The embeddings (B, T, D)."""
        return self.norm(self.words[ids] + self.positions[: ids.shape[1]] + self.types[types])


class Layer(nnx.Module):
    """Self-attention, then two dense layers. Each of the two parts is added to its input and then normalised."""

    def __init__(self, config: DynaBERTConfig, *, rngs: nnx.Rngs):
        d, ffn = config.hidden_size, config.ffn[-1]
        self.heads = config.heads[-1]
        self.query, self.key, self.value, self.attention_out = (nnx.Linear(d, d, rngs=rngs) for _ in range(4))
        self.attention_norm, self.ffn_norm = _norm(config, rngs), _norm(config, rngs)
        self.ffn_in, self.ffn_out = nnx.Linear(d, ffn, rngs=rngs), nnx.Linear(ffn, d, rngs=rngs)

    def __call__(self, x, mask):
        """The tokens (B, T, D)."""
        split = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
        context = jax.nn.dot_product_attention(q, k, v, mask=mask)
        x = self.attention_norm(x + self.attention_out(context.reshape(x.shape)))
        return self.ffn_norm(x + self.ffn_out(nnx.gelu(self.ffn_in(x), approximate=False)))


class BERT(nnx.Module):
    """The network of maximum size."""

    def __init__(self, config: DynaBERTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.pooler = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, config.num_classes, rngs=rngs)

    def __call__(self, inputs):
        """Logits (B, classes) of packed inputs, int32 (B, T, 2)."""
        ids, types = inputs[..., 0], inputs[..., 1]
        x = self.embeddings(ids, types)
        for layer in self.layers:
            x = layer(x, (ids != self.config.pad_id)[:, None, None, :])
        return self.classifier(jnp.tanh(self.pooler(x[:, 0])))


@ss.elastic.family("plain_dynabert", axes={"pooler": None}, depth={"layers": (0,)}, rule="every_other")
@dataclasses.dataclass(frozen=True)
class PlainDynaBERTConfig:
    """A DynaBERT as a plain module.

    Args:
      model: the sizes and the search space. It must have two token types.
    """

    model: DynaBERTConfig = dataclasses.field(default_factory=DynaBERTConfig)

    vocab_size = property(lambda self: self.model.vocab_size)
    max_length = property(lambda self: self.model.max_length)
    token_types = property(lambda self: self.model.token_types)
    pad_id = property(lambda self: self.model.pad_id)

    def build(self, rngs: nnx.Rngs) -> BERT:
        """The plain network."""
        return BERT(self.model, rngs=rngs)

    def input_spec(self, batch: int, *, length: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape and dtype of packed inputs."""
        return self.model.input_spec(batch, length=length)

    def pack(self, ids, types=None, *, mask=None, length=None):
        """Packed inputs from the arrays of a tokenizer."""
        return self.model.pack(ids, types, mask=mask, length=length)

    def space(self) -> ss.SearchSpace:
        """The search space of DynaBERT."""
        return self.model.space()

    def sizes(self, subnet: ss.Subnet) -> dict[str, int]:
        """The sizes of a subnet, by the names that `self.found` has for axes and blocks."""
        sizes = {}
        for i, gate in enumerate(subnet.gates):
            layer = f"layers.{i}"
            sizes |= {f"depth {layer}": gate, f"{layer}.ffn_in": subnet["ffn"][i], f"{layer}.key": subnet["heads"][i]}
        return sizes


def _norm(config: DynaBERTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.eps, use_fast_variance=False, rngs=rngs)


def get_config() -> TrainConfig:
    """The experiment of configs/dynabert_sst2.py, with the plain module."""
    hand = load_config("dynabert_sst2")
    return dataclasses.replace(hand, name="plain_dynabert", model=PlainDynaBERTConfig(hand.model))
