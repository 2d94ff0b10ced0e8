"""Writes a BERT classifier as Hugging Face's `save_pretrained` does, without the library transformers."""

import json
import pathlib

import numpy as np
import tokenizers
from published import bert_state
from tiny import random_params

from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

WORDS = ("good", "bad", "film", "the", "a", "is", "was", "un", "##able", "##s", "not", "very", ".", ",", "é")
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
LABELS = ("negative", "positive")
SIZES = DynaBERTConfig(
    num_classes=len(LABELS),
    vocab_size=len(TOKENS),
    max_length=16,
    hidden_size=16,
    depths=(1, 2),
    heads=(1, 2, 3, 4),
    ffn=(8, 16, 24, 32),
)


def random_model(config=SIZES):
    return SuperNet(config, random_params(config))


def config_json(config=SIZES, labels=LABELS):
    """What Hugging Face writes to config.json."""
    return {
        "architectures": ["BertForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": config.hidden_size,
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "initializer_range": 0.02,
        "intermediate_size": config.ffn[-1],
        "label2id": {name: i for i, name in enumerate(labels)},
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.max_length,
        "model_type": "bert",
        "num_attention_heads": config.heads[-1],
        "num_hidden_layers": config.num_layers,
        "pad_token_id": config.pad_id,
        "position_embedding_type": "absolute",
        "problem_type": "single_label_classification",
        "torch_dtype": "float32",
        "transformers_version": "4.57.0",
        "type_vocab_size": config.token_types,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def fast_tokenizer(tokens=TOKENS, *, lowercase=True):
    """BERT's tokenizer as the library tokenizers has it, which saves it as tokenizer.json."""
    ids = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.add_special_tokens([token for token in tokens if token.startswith("[")])
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return made


def write(path, model=None, *, labels=LABELS, tokens=TOKENS, lowercase=True, weights="model.safetensors", changes=()):
    """Writes a directory, and returns its path and the model.

    Args:
      path: the directory.
      model: the SuperNet; one with random weights if left out.
      labels: the names of the classes.
      tokens: the tokens of the vocabulary.
      lowercase: whether the tokenizer changes text to lower case.
      weights: "model.safetensors", or "parts" for two files with an index.
      changes: new values for fields of config.json.
    """
    import safetensors.numpy

    path, model = pathlib.Path(path), model or random_model()
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", {**config_json(model.config, labels), **dict(changes)})
    state = {name: np.ascontiguousarray(value) for name, value in bert_state(model).items()}
    if weights == "parts":
        names = sorted(state)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, kept in parts.items():
            safetensors.numpy.save_file({name: state[name] for name in kept}, path / file)
        places = {name: file for file, kept in parts.items() for name in kept}
        _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": places})
    else:
        safetensors.numpy.save_file(state, path / weights)
    fast_tokenizer(tokens, lowercase=lowercase).save(str(path / "tokenizer.json"))
    (path / "vocab.txt").write_text(Vocabulary(tokens).to_text())
    _write_json(
        path / "tokenizer_config.json",
        {
            "do_lower_case": lowercase,
            "model_max_length": 512,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "tokenizer_class": "BertTokenizer",
            "cls_token": "[CLS]",
            "pad_token": "[PAD]",
        },
    )
    return path, model


def change(path, **fields):
    """Changes fields of a JSON file; None removes a field."""
    values = {**json.loads(path.read_text()), **fields}
    _write_json(path, {name: value for name, value in values.items() if value is not None})


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=2))


def write_texts(path, count=60):
    """Writes a CSV file of labelled texts, of which each names its class, and returns its path."""
    lines = [f"the film was {('bad', 'good')[i % 2]},{LABELS[i % 2]}" for i in range(count)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path
