"""Reads a directory of a BERT sequence classifier (`BertForSequenceClassification`), which becomes a DynaBERT.

The weights of another architecture may have the same shapes and another meaning. So config.json must say explicitly that the
network is one that DynaBERT computes.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from superserve_jax import errors
from superserve_jax.convert import choices, folder, hugging_face, labels, settings, tokenizer
from superserve_jax.convert.settings import Ratio, Size
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

_SUPPORTED = "BertForSequenceClassification"

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
    vocab_size: Size = 30522
    max_position_embeddings: Size = 512
    type_vocab_size: Size = 2
    hidden_size: Size = 768
    num_hidden_layers: Size = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    pad_token_id: int | None = 0
    layer_norm_eps: Ratio = 1e-12


def read(
    path: pathlib.Path,
    fields: Mapping[str, Any],
    *,
    max_length: int | None,
    depths: Sequence[int] | None,
    heads: Sequence[int] | None,
    ffn: Sequence[int] | None,
) -> tuple[SuperNet, tuple[str, ...], Vocabulary | None]:
    """The SuperNet, class names and vocabulary of a directory. `fields` is the content of its config.json.

    The other arguments and the errors are those of `pretrained.from_pretrained`.
    """
    file = path / "config.json"
    _check_supported(file, fields)
    with errors.refusing(errors.ConversionError, f"{file} is not the config of a {_SUPPORTED}; save it again"):
        found = msgspec.convert(fields, _Config)
    class_names = labels.read(file, found.id2label, found.num_labels)
    vocabulary, tokenizer_length = tokenizer.read(path)
    longest = min(found.max_position_embeddings, tokenizer_length or found.max_position_embeddings)
    config = DynaBERTConfig(
        num_classes=len(class_names),
        vocab_size=found.vocab_size,
        max_length=longest if max_length is None else max_length,
        token_types=found.type_vocab_size,
        hidden_size=found.hidden_size,
        depths=choices.checked("depths", depths, choices.upper_half(found.num_hidden_layers)),
        heads=choices.checked("heads", heads, choices.quarters(found.num_attention_heads)),
        ffn=choices.checked("ffn", ffn, choices.quarters(found.intermediate_size)),
        pad_id=vocabulary.pad_id if vocabulary else found.pad_token_id or 0,
        eps=found.layer_norm_eps,
    )
    if vocabulary is not None:
        vocabulary.check_fit(config)
    return hugging_face.fill(config, folder.read_weights(path)), class_names, vocabulary


def _check_supported(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Raises ConversionError, with all that is not supported in one message, unless the network is a BERT classifier."""
    kind, names = fields.get("model_type"), fields.get("architectures") or [_SUPPORTED]
    architecture = names[0] if isinstance(names, list) and names else names
    if kind != "bert":
        reason = f" ({_REASONS[kind]})" if isinstance(kind, str) and kind in _REASONS else ""
        raise errors.ConversionError(
            f"{path}: {architecture if 'architectures' in fields else 'the network'} of model_type {kind!r} is not supported"
            f"{reason}; supported are {_SUPPORTED} of model_type 'bert', and classifiers of images of model_type 'vit', "
            "'deit', 'dinov2' and 'dinov2_with_registers'"
        )
    if architecture != _SUPPORTED:
        raise errors.ConversionError(
            f"{path}: {architecture} is not supported, because it is not a classifier of texts; supported is {_SUPPORTED}. "
            "Fine-tune the model as one, and save it again"
        )
    if wrong := settings.unsupported(fields, _SETTINGS, _EXPLAINED):
        raise errors.ConversionError(f"{path}: this BERT is not supported, {'; '.join(wrong)}")
