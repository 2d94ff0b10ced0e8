"""DynaBERT: BERT with elastic depth and width (Hou et al., NeurIPS 2020), the transformer SuperNet of SuperServe.

The network adds word, position and token-type embeddings. Post-LayerNorm encoder layers (Devlin et al., NAACL 2019) follow,
then a tanh pooler on the first token and a linear classifier.

Three things are elastic: the layers that a subnet keeps, and in each layer the numbers of attention heads and feed-forward
neurons. DynaBERT's every-other rule selects the layers, or the subnet names its gates. A subnet runs the first heads and
neurons. The hidden size is not elastic. So LayerNorm sees all of it in every subnet and needs no statistics.

**Input.** An executable has one input, so token ids and token types are one array: int32 (B, T, 2), ids first. A network with
only one token type takes ids alone, (B, T). The network does not compute types from separator tokens, since these depend on
the vocabulary. Positions with `pad_id` are padding: no token attends to them. `DynaBERTConfig.pack` makes this array.

Axis letters: B batch, T tokens, D hidden size, K classes, N entries of an embedding table. `*two` is the
axis of ids and types, which is missing with one token type.
"""

import dataclasses
import math
import numbers
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from superserve_jax import errors, layers, ops
from superserve_jax.lengths import check_ascending
from superserve_jax.space import Axis, SearchSpace, check_depths
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import UnitAxis, Units

_PROJECTIONS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class DynaBERTConfig:
    """Sizes and search space of a DynaBERT. The defaults are the published DynaBERT on BERT-base, for MNLI.

    Args:
      num_classes: size of the logits.
      vocab_size: number of token ids.
      max_length: longest sequence, in tokens. `flops` counts inputs of this length.
      token_types: number of token types. With 1, inputs are ids alone.
      hidden_size: D, a multiple of the largest number of heads.
      depths: allowed numbers of kept layers, ascending. The last is the number of layers of the whole network.
      heads: allowed numbers of attention heads of a layer, ascending. The last is that number in the whole network.
      ffn: allowed numbers of feed-forward neurons of a layer, ascending. The last is that number in the whole network.
      pad_id: token id of padding.
      eps: epsilon of LayerNorm.

    >>> config = DynaBERTConfig()
    >>> config.space().subnet(depth=6).gates
    (1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0)
    """

    family: ClassVar[str] = "dynabert"

    num_classes: int = 3
    vocab_size: int = 30522
    max_length: int = 128
    token_types: int = 2
    hidden_size: int = 768
    depths: tuple[int, ...] = (6, 9, 12)
    heads: tuple[int, ...] = (3, 6, 9, 12)
    ffn: tuple[int, ...] = (768, 1536, 2304, 3072)
    pad_id: int = 0
    eps: float = 1e-12

    @errors.refusing(errors.ConfigError, "DynaBERTConfig: every field must have the type of its default")
    def __post_init__(self):
        _check(self)

    @property
    def num_layers(self) -> int:
        """Number of layers of the largest subnet."""
        return self.depths[-1]

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads[-1]

    def create(self, rngs: nnx.Rngs) -> "DynaBERT":
        """A freshly initialised network of maximum size."""
        return DynaBERT(self, rngs=rngs)

    def input_spec(self, batch: int, *, length: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape (B, T, 2), or (B, T) with one token type, and dtype of the input; T is `max_length` unless given."""
        length = self._length(length)
        return jax.ShapeDtypeStruct((batch, length) if self.token_types == 1 else (batch, length, 2), jnp.int32)

    @errors.refusing(errors.InputError, "ids, types and mask must be arrays of whole numbers (B, T)")
    def pack(self, ids: Any, types: Any = None, *, mask: Any = None, length: int | None = None) -> np.ndarray:
        """Makes inputs from the arrays of a tokenizer.

        Args:
          ids: token ids (B, T), whole numbers.
          types: token types (B, T); all 0 if left out.
          mask: (B, T), 0 at padding. If left out, padding is where the id is `pad_id`.
          length: pad to this number of tokens; `max_length` if left out.

        Returns:
          An int32 array of the shape of `input_spec`.

        Raises:
          InputError: shapes differ, an id or type is unknown, or the mask keeps a token with the id of padding.
          ConfigError: `length` is not from 1 to `max_length`.

        >>> DynaBERTConfig(vocab_size=9, max_length=4).pack([[5, 7, 6]], [[0, 0, 1]]).tolist()
        [[[5, 0], [7, 0], [6, 1], [0, 0]]]
        """
        length, ids = self._length(length), np.asarray(ids)
        types = np.zeros_like(ids) if types is None else np.asarray(types)
        keep = ids != self.pad_id if mask is None else np.asarray(mask) != 0
        if ids.ndim != 2 or not ids.shape == types.shape == keep.shape or ids.shape[1] > length:
            raise errors.InputError(
                f"ids, types and mask must have one shape (batch, at most {length} tokens), got {ids.shape}, {types.shape} "
                f"and {keep.shape}"
            )
        for name, values, count in (("token ids", ids, self.vocab_size), ("token types", types, self.token_types)):
            bad = keep & ((values < 0) | (values >= count) | (values.dtype.kind not in "iu"))
            if bad.any():
                raise errors.InputError(f"{name} must be whole numbers from 0 to {count - 1}, got {values[bad][0]}")
        if (keep & (ids == self.pad_id)).any():
            raise errors.InputError(f"the mask keeps a token of id {self.pad_id}, which is padding here (pad_id)")
        packed = np.zeros((len(ids), length, 2), np.int32)
        packed[:, :, 0] = self.pad_id
        packed[:, : ids.shape[1]] = np.stack([np.where(keep, ids, self.pad_id), np.where(keep, types, 0)], axis=-1)
        return packed[:, :, 0] if self.token_types == 1 else packed

    def space(self) -> SearchSpace:
        """The search space: one stage of all layers, and two axes with one position per layer."""
        blocks = tuple(range(self.num_layers))
        axes = (Axis(name, (getattr(self, name),) * len(blocks), blocks) for name in ("heads", "ffn"))
        return SearchSpace((self.depths,), tuple(axes), rule="every_other")

    def sizes(self, subnet: Subnet) -> dict[str, int]:
        """Gates and channels of a subnet by name. No other code converts heads to channels."""
        sizes = {}
        for i, (gate, heads, ffn) in enumerate(zip(subnet.gates, subnet["heads"], subnet["ffn"], strict=True)):
            sizes[f"layer{i}.gate"] = gate
            sizes[f"layer{i}.attention"] = heads * self.head_size
            sizes[f"layer{i}.ffn"] = ffn
        return sizes

    def norm_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """Empty: LayerNorm has no statistics."""
        return {}

    def flops(self, subnet: Subnet) -> int:
        """Multiply-adds for one sequence of `max_length` tokens. Padding counts. Look-ups and norms do not count."""
        d, t = self.hidden_size, self.max_length
        per_layer = (4 * t * d * attention + 2 * t * t * attention + 2 * t * d * ffn for attention, ffn in self._kept(subnet))
        return sum(per_layer) + d * d + d * self.num_classes

    def num_params(self, subnet: Subnet) -> int:
        """Number of weights that the subnet needs on its own."""
        d = self.hidden_size
        per_layer = ((4 * d + 3) * attention + (2 * d + 1) * ffn + 6 * d for attention, ffn in self._kept(subnet))
        embeddings = (self.vocab_size + self.max_length + self.token_types + 2) * d
        return embeddings + sum(per_layer) + (d + 1) * (d + self.num_classes)

    def num_vector_params(self, subnet: Subnet) -> int:
        """How many of these weights are in vectors: biases, and the scales of norms."""
        d = self.hidden_size
        return 2 * d + sum(3 * attention + ffn + 6 * d for attention, ffn in self._kept(subnet)) + d + self.num_classes

    def units(self) -> list[Units]:
        """The heads and the neurons of each layer."""
        found = []
        for layer in (f"layers.{i}" for i in range(self.num_layers)):
            heads = [UnitAxis(f"{layer}.{n}.{p}", axis) for p, axis in (("kernel", 1), ("bias", 0)) for n in _PROJECTIONS]
            found.append(Units(self.heads[-1], tuple(heads), (UnitAxis(f"{layer}.attention_out.kernel", 0),)))
            neurons = (UnitAxis(f"{layer}.ffn_in.kernel", 1), UnitAxis(f"{layer}.ffn_in.bias", 0))
            found.append(Units(self.ffn[-1], neurons, (UnitAxis(f"{layer}.ffn_out.kernel", 0),)))
        return found

    def _kept(self, subnet: Subnet) -> list[tuple[int, int]]:
        """(attention channels, feed-forward neurons) of each layer that a subnet keeps."""
        s = self.sizes(subnet)
        return [(s[f"layer{i}.attention"], s[f"layer{i}.ffn"]) for i in range(self.num_layers) if s[f"layer{i}.gate"]]

    def _length(self, length: int | None) -> int:
        if length is not None and not (isinstance(length, numbers.Integral) and 1 <= length <= self.max_length):
            raise errors.ConfigError(f"length must be from 1 to max_length={self.max_length}, got {length}")
        return length or self.max_length


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: DynaBERTConfig, *, rngs: nnx.Rngs):
        def table(count: int) -> nnx.Param:
            init = nnx.initializers.truncated_normal(0.02)
            return nnx.Param(init(rngs.params(), (count, config.hidden_size), jnp.float32))

        self.words, self.positions, self.types = (table(n) for n in (config.vocab_size, config.max_length, config.token_types))
        self.norm = _layer_norm(config, rngs)

    def __call__(self, ids: Int[Array, "B T"], types: Int[Array, "B T"] | None) -> Float[Array, "B T D"]:
        """The embeddings. An unknown id or type gives NaN, never the embedding of another token."""
        positions = ops.weight_slice(self.positions[...], ids.shape[1], self.positions.shape[1])
        kinds = self.types[0] if types is None else _look_up(self.types[...], types)
        x = _look_up(self.words[...], ids) + positions + kinds
        return self.norm(x).astype(x.dtype)


class EncoderLayer(nnx.Module):
    """Self-attention, then two dense layers. Each of the two parts is added to its input and then normalised."""

    def __init__(self, config: DynaBERTConfig, *, rngs: nnx.Rngs):
        d, ffn = config.hidden_size, config.ffn[-1]
        self.query = layers.Linear(d, d, rngs=rngs)
        self.key = layers.Linear(d, d, rngs=rngs)
        self.value = layers.Linear(d, d, rngs=rngs)
        self.attention_out = layers.Linear(d, d, rngs=rngs)
        self.attention_norm = _layer_norm(config, rngs)
        self.ffn_in = layers.Linear(d, ffn, rngs=rngs)
        self.ffn_out = layers.Linear(ffn, d, rngs=rngs)
        self.ffn_norm = _layer_norm(config, rngs)
        self.head_size = config.head_size

    def __call__(
        self, x: Float[Array, "B T D"], attention: ops.Size, ffn: ops.Size, mask: Bool[Array, "B 1 1 T"]
    ) -> Float[Array, "B T D"]:
        """The output. `attention` counts the channels of the active heads. A masked head has zero values, so it adds 0."""
        b, t, d = x.shape
        q, k, v = (project(x, attention).reshape(b, t, -1, self.head_size) for project in (self.query, self.key, self.value))
        context = jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(b, t, -1)
        x = self.attention_norm(x + self.attention_out(context, d)).astype(x.dtype)
        inner = jax.nn.gelu(self.ffn_in(x, ffn), approximate=False)  # gelu(0) is 0, so masked neurons stay zero
        return self.ffn_norm(x + self.ffn_out(inner, d)).astype(x.dtype)


class DynaBERT(nnx.Module):
    """The network of maximum size. A call takes the sizes of a subnet."""

    def __init__(self, config: DynaBERTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.pooler = layers.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.classifier = layers.Linear(config.hidden_size, config.num_classes, rngs=rngs)

    def __call__(
        self, inputs: Int[Array, "B T *two"], sizes: dict[str, ops.Size], stats: layers.BatchStats | layers.StoredStats
    ) -> Float[Array, "B K"]:
        """Logits of packed inputs of any length up to `max_length`."""
        config = self.config
        ids, types = (inputs, None) if config.token_types == 1 else (inputs[..., 0], inputs[..., 1])
        mask = (ids != config.pad_id)[:, None, None, :]
        x = self.embeddings(ids, types)
        for i, layer in enumerate(self.layers):
            attention, ffn = sizes[f"layer{i}.attention"], sizes[f"layer{i}.ffn"]
            run = lambda x, layer=layer, attention=attention, ffn=ffn: layer(x, attention, ffn, mask)  # noqa: E731
            gate = sizes[f"layer{i}.gate"]
            x = ops.layer_select(gate, run, x, skip=isinstance(stats, layers.StoredStats))
            if isinstance(stats, layers.BatchStats):
                stats.hidden.append((jnp.asarray(gate if isinstance(gate, int) else gate[1], jnp.float32), x))
        return self.classifier(jnp.tanh(self.pooler(x[:, 0], config.hidden_size)), config.num_classes)


def _layer_norm(config: DynaBERTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.eps, use_fast_variance=False, rngs=rngs)


def _look_up(table: Float[Array, "N D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return jnp.asarray(table).at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _check(config: DynaBERTConfig) -> None:
    """Raises ConfigError if no network can have this config."""

    def demand(ok: bool, what: str):
        if not ok:
            raise errors.ConfigError(f"DynaBERTConfig: {what}")

    for name in ("num_classes", "vocab_size", "max_length", "token_types", "hidden_size"):
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        demand(whole, f"{name} must be a whole number from 1 up, got {value!r}")
    for name in ("depths", "heads", "ffn"):
        check_ascending(f"DynaBERTConfig: {name}", getattr(config, name), str(getattr(DynaBERTConfig, name)))
    check_depths((config.depths,))
    demand(
        config.hidden_size % config.heads[-1] == 0,
        f"hidden_size must be a multiple of the {config.heads[-1]} heads, got {config.hidden_size}",
    )
    demand(
        config.pad_id in range(config.vocab_size),
        f"pad_id must be an id from 0 to {config.vocab_size - 1}, got {config.pad_id}",
    )
    demand(math.isfinite(config.eps) and config.eps > 0, f"eps must be positive, got {config.eps}")
