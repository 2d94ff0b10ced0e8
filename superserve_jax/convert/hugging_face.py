"""Converts Hugging Face's BERT classifiers (`BertForSequenceClassification`). DynaBERT's published weights are such."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from superserve_jax import errors
from superserve_jax.convert import choices, state_dict
from superserve_jax.convert.state_dict import Source
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

_EMBEDDINGS = "bert.embeddings"
_LAYER = "bert.encoder.layer"
_TABLES = {"words": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}
_NUMBERS = ("num_classes", "vocab_size", "token_types", "hidden_size")  # sizes that the config states as one number
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}


def bert(
    state: Any,
    *,
    num_heads: int,
    depths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ffn: Sequence[int] | None = None,
    max_length: int | None = None,
) -> SuperNet:
    """The SuperNet of a state dict of Hugging Face's `BertForSequenceClassification`.

    The weights show all sizes except the number of heads. If `depths`, `heads` and `ffn` are left out, the search space is as
    large as the network allows. To train the SuperNet, choose fewer values, as in `DynaBERTConfig`.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      num_heads: number of attention heads of a layer.
      depths: allowed numbers of layers; if left out, from 1 to all.
      heads: allowed numbers of heads; if left out, from 1 to all.
      ffn: allowed numbers of feed-forward neurons; if left out, k / num_heads and k / 4 of all neurons, for every k.
      max_length: the longest sequence, in tokens; if left out, the number of positions in the weights.

    Returns:
      A SuperNet whose inputs `config.pack(ids, types, mask=mask)` makes.

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message names them.
      ConfigError: an argument is impossible, or does not fit the weights.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise errors.ConfigError(f"num_heads must be a whole number from 1 up, got {num_heads!r}")
    weights = state_dict.read(state)
    sizes = {name: found or 1 for name, found in _sizes(weights).items()}
    positions, neurons = sizes["positions"], sizes["ffn"]
    shares = {(k, n) for n in (num_heads, 4) for k in range(1, n + 1)}
    config = DynaBERTConfig(
        num_classes=sizes["num_classes"],
        vocab_size=sizes["vocab_size"],
        max_length=positions if max_length is None else max_length,
        token_types=sizes["token_types"],
        hidden_size=_sizes(weights)["hidden_size"] or num_heads,
        depths=choices.checked("depths", depths, range(1, sizes["depths"] + 1)),
        heads=choices.checked("heads", heads, range(1, num_heads + 1)),
        ffn=choices.checked("ffn", ffn, sorted({max(1, neurons * k // n) for k, n in shares})),
    )
    if config.max_length > positions:
        raise errors.ConfigError(f"the weights have {positions} positions, fewer than max_length={max_length}")
    return fill(config, weights)


def fill(config: DynaBERTConfig, weights: Mapping[str, np.ndarray]) -> SuperNet:
    """The SuperNet of `config` with weights from `state_dict.read`. Raises the errors of `bert`."""
    _check_sizes(config, weights)
    positions = max(config.max_length, _sizes(weights)["positions"] or 0)
    found = state_dict.take(
        weights,
        _sources(config, positions),
        what=f"a BERT classifier of {config.num_layers} layers, hidden size {config.hidden_size} and {config.ffn[-1]} "
        f"feed-forward neurons",
        hint="are they from a BertForSequenceClassification of these sizes?",
    )
    found["embeddings.positions"] = found["embeddings.positions"][: config.max_length]
    return SuperNet(config, {name: jnp.array(value) for name, value in found.items()})


def _sizes(weights: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    """The sizes that the weights show; None for a size that no weight shows. A later error names a weight that differs."""

    def rows(pattern: str) -> int | None:
        """The most common length of the first axis of the weights whose names match."""
        lengths = [v.shape[0] for name, v in weights.items() if re.fullmatch(pattern, name) and v.ndim and v.shape[0]]
        return collections.Counter(lengths).most_common(1)[0][0] if lengths else None

    layers = [int(m[1]) for m in (re.match(rf"{_LAYER}\.(\d+)\.", name) for name in weights) if m]
    return {
        "num_classes": rows(r"classifier\.(weight|bias)"),
        "vocab_size": rows(rf"{_EMBEDDINGS}\.word_embeddings\.weight"),
        "positions": rows(rf"{_EMBEDDINGS}\.position_embeddings\.weight"),
        "token_types": rows(rf"{_EMBEDDINGS}\.token_type_embeddings\.weight"),
        "hidden_size": rows(r"bert\..*\.LayerNorm\.(weight|gamma|bias|beta)"),
        "depths": 1 + max(layers) if layers else None,
        "ffn": rows(rf"{_LAYER}\.\d+\.intermediate\.dense\.bias"),
    }


def _check_sizes(config: DynaBERTConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Raises ConversionError if the weights are of a BERT with other sizes than the config."""
    sizes = _sizes(weights)
    pairs: dict[str, tuple[Any, int]] = {
        **{f"model.{name}": (sizes[name], getattr(config, name)) for name in _NUMBERS},
        **{f"the largest of model.{name}": (sizes[name], getattr(config, name)[-1]) for name in ("depths", "ffn")},
    }
    positions = sizes["positions"]
    if positions is not None and positions < config.max_length:
        pairs["model.max_length"] = (f"at most {positions}", config.max_length)
    state_dict.check_sizes("a BERT classifier", pairs)


def _sources(config: DynaBERTConfig, positions: int) -> dict[str, Source]:
    """The source of each parameter. `positions` is the number of positions in the weights. `fill` cuts them later."""
    shapes = {name: spec.shape for name, spec in programs.param_spec(config).items()}
    shapes["embeddings.positions"] = (positions, config.hidden_size)
    dense = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
    norms = {"embeddings.norm": f"{_EMBEDDINGS}.LayerNorm"}
    for i in range(config.num_layers):
        dense |= {f"layers.{i}.{ours}": f"{_LAYER}.{i}.{theirs}" for ours, theirs in _DENSE.items()}
        norms |= {f"layers.{i}.{ours}": f"{_LAYER}.{i}.{theirs}" for ours, theirs in _NORMS.items()}
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in _TABLES.items():
        names[f"embeddings.{ours}"] = (f"{_EMBEDDINGS}.{theirs}.weight",)
    for ours, theirs in dense.items():
        names[f"{ours}.kernel"] = (f"{theirs}.weight",)
        names[f"{ours}.bias"] = (f"{theirs}.bias",)
    for ours, theirs in norms.items():  # gamma and beta are the names in files converted from TensorFlow
        names[f"{ours}.scale"] = (f"{theirs}.weight", f"{theirs}.gamma")
        names[f"{ours}.bias"] = (f"{theirs}.bias", f"{theirs}.beta")
    return {ours: Source(names[ours], shape, (1, 0) if ours.endswith(".kernel") else None) for ours, shape in shapes.items()}
