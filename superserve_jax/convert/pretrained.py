"""Reads a directory that Hugging Face's `save_pretrained` wrote: config.json, the weights, and the tokenizer's files.

Only a BERT sequence classifier (`BertForSequenceClassification`) becomes a DynaBERT. The weights of another architecture may
have the same shapes and another meaning. So config.json must say explicitly that the network is one that DynaBERT computes.
Nothing in the directory runs.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from superserve_jax import errors, exports, files
from superserve_jax.convert import folder, hugging_face, tokenizer
from superserve_jax.exports import Served
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

_SUPPORTED = "BertForSequenceClassification"
_MOST_CLASSES = 100_000

_DECODER = "it is a decoder, which generates text"
_OTHER_HEAD = "its classifier has another hidden layer"
_REASONS = {  # why the network of a model_type is not BERT's
    "roberta": f"it counts positions from the id of padding on, and {_OTHER_HEAD}",
    "xlm-roberta": f"it counts positions from the id of padding on, and {_OTHER_HEAD}",
    "camembert": f"it counts positions from the id of padding on, and {_OTHER_HEAD}",
    "distilbert": f"it has no token types and no pooler, and {_OTHER_HEAD}",
    "albert": "all its layers share one set of weights",
    "electra": _OTHER_HEAD,
    "deberta": "its positions are relative",
    "deberta-v2": "its positions are relative",
    "xlnet": "its positions are relative",
    "modernbert": "its positions are rotary, and its feed-forward layers are gated",
    "mobilebert": "its layers have bottlenecks",
    "t5": "it is an encoder with a decoder",
    "bart": "it is an encoder with a decoder",
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi"), _DECODER),
}
# Settings of config.json that change what the network computes, with the values that DynaBERT computes, the default first.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "problem_type": (None, "single_label_classification"),
}
_EXPLAINED = {
    "problem_type": "regression and several labels for one text are not supported",
    "pruned_heads": "save the model before its heads were pruned",
}


class _Config(msgspec.Struct):
    """The sizes in config.json, with Hugging Face's defaults. A file may leave out fields with default values."""

    id2label: dict[str, str] | None = None
    num_labels: int | None = None
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    pad_token_id: int | None = 0
    layer_norm_eps: float = 1e-12


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A converted classifier.

    Args:
      model: the SuperNet; its largest subnet is the original network.
      class_names: the name of each logit.
      vocabulary: how text becomes token ids, or None if the directory has no tokenizer.
    """

    model: SuperNet
    class_names: tuple[str, ...]
    vocabulary: Vocabulary | None

    @property
    def config(self) -> DynaBERTConfig:
        """The sizes and the search space."""
        assert isinstance(self.model.config, DynaBERTConfig)
        return self.model.config

    def export(self, path: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None) -> pathlib.Path:
        """Exports the original network as the only served subnet, and returns the path.

        Its accuracy is unknown, and so are those of smaller subnets. So none of them is served: without labelled texts, nobody
        can tell which of them answer well enough. Arguments and errors are those of `exports.export`.
        """
        largest, config = self.model.space.largest(), self.config
        model = SuperNet(config, self.model.params, {largest: np.zeros((2, 0), np.float32)})  # LayerNorm has no statistics
        return exports.export(
            path,
            model,
            [Served(largest, None, None, config.flops(largest), config.num_params(largest))],
            measured="not measured: converted weights, without labelled texts",
            class_names=self.class_names,
            vocabulary=self.vocabulary,
            training=training,
        )


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    depths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    ffn: Sequence[int] | None = None,
) -> Pretrained:
    """The SuperNet, class names and vocabulary of a directory that `save_pretrained` wrote.

    Args:
      path: the directory, with config.json, weights as model.safetensors or pytorch_model.bin (also in several parts, with an
        index), and a tokenizer as tokenizer.json or vocab.txt.
      max_length: the longest sequence, in tokens; if left out, as many as model and tokenizer can take.
      depths: allowed numbers of layers; if left out, from half of them to all.
      heads: allowed numbers of attention heads of a layer; if left out, quarters of all heads.
      ffn: allowed numbers of feed-forward neurons of a layer; if left out, quarters of all neurons.

    Raises:
      ConversionError: a file is missing or damaged, or the network or the tokenizer is not supported.
      ConfigError: an argument is impossible, or does not fit the network.
    """
    with errors.refusing(errors.ConversionError, f"expected the path of a directory, got {path!r}"):
        path = files.user_path(path)
    file = path / "config.json"
    fields = folder.read_json(file)
    _check_supported(file, fields)
    with errors.refusing(errors.ConversionError, f"{file} is not the config of a {_SUPPORTED}; save it again"):
        found = msgspec.convert(fields, _Config)
    class_names = _class_names(file, found)
    vocabulary, tokenizer_length = tokenizer.read(path)
    layers, all_heads, neurons = found.num_hidden_layers, found.num_attention_heads, found.intermediate_size
    longest = min(found.max_position_embeddings, tokenizer_length or found.max_position_embeddings)
    config = DynaBERTConfig(
        num_classes=len(class_names),
        vocab_size=found.vocab_size,
        max_length=longest if max_length is None else max_length,
        token_types=found.type_vocab_size,
        hidden_size=found.hidden_size,
        depths=hugging_face.choices("depths", depths, range((layers + 1) // 2, layers + 1)),
        heads=hugging_face.choices("heads", heads, _quarters(all_heads)),
        ffn=hugging_face.choices("ffn", ffn, _quarters(neurons)),
        pad_id=vocabulary.pad_id if vocabulary else found.pad_token_id or 0,
        eps=found.layer_norm_eps,
    )
    if vocabulary is not None:
        vocabulary.check_fit(config)
    return Pretrained(hugging_face.fill(config, folder.read_weights(path)), class_names, vocabulary)


def _check_supported(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Raises ConversionError, with all that is not supported in one message, unless the network is a BERT classifier."""
    kind, names = fields.get("model_type"), fields.get("architectures") or [_SUPPORTED]
    architecture = names[0] if isinstance(names, list) and names else names
    if kind != "bert":
        reason = f" ({_REASONS[kind]})" if isinstance(kind, str) and kind in _REASONS else ""
        raise errors.ConversionError(
            f"{path}: {architecture if 'architectures' in fields else 'the network'} of model_type {kind!r} is not supported"
            f"{reason}; supported is {_SUPPORTED} of model_type 'bert'"
        )
    if architecture != _SUPPORTED:
        raise errors.ConversionError(
            f"{path}: {architecture} is not supported, because it is not a classifier of texts; supported is {_SUPPORTED}. "
            "Fine-tune the model as one, and save it again"
        )
    wrong = []
    for name, values in _SETTINGS.items():
        found = fields.get(name, values[0])
        if found not in values:
            why = f": {_EXPLAINED[name]}" if name in _EXPLAINED else ""
            wrong.append(f"{name} is {found!r} instead of {values[-1] if values[0] is None else values[0]!r}{why}")
    if wrong:
        raise errors.ConversionError(f"{path}: this BERT is not supported, {'; '.join(wrong)}")


def _class_names(path: pathlib.Path, config: _Config) -> tuple[str, ...]:
    """The name of each class, in the order of the logits."""
    names = config.id2label
    if names is None:
        names = {str(i): f"LABEL_{i}" for i in range(2 if config.num_labels is None else config.num_labels)}
    if len(names) < 2:
        raise errors.ConversionError(
            f"{path}: a classifier needs two or more labels, got {list(names.values())}; one label is a regression, which is "
            "not supported"
        )
    if len(names) > _MOST_CLASSES or set(names) != set(map(str, range(len(names)))):
        raise errors.ConversionError(f"{path}: id2label must number the labels from 0 up, got the ids {list(names)[:5]}")
    return tuple(names[str(i)] for i in range(len(names)))


def _quarters(count: int) -> list[int]:
    """A quarter, a half, three quarters and all of `count`, as whole numbers from 1 up.

    >>> _quarters(12), _quarters(2)
    ([3, 6, 9, 12], [1, 2])
    """
    return sorted({max(1, count * k // 4) for k in (1, 2, 3, 4)})
