"""Tiny networks with random weights, saved as once-for-all and Hugging Face would save them."""

import numpy as np
from tiny import assert_same_arrays, random_params, random_statistics

from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

OFA = OFAResNetConfig(
    num_classes=5,
    image_size=32,
    depths=((2, 3), (2, 3), (4, 5), (2, 3)),
    expand_ratios=(0.25, 0.5),
    width_mults=(0.06, 0.1),
    input_dtype="float32",
)
OFA_LISTS = {"depth_list": [0, 1], "expand_ratio_list": [0.25, 0.5], "width_mult_list": [0.06, 0.1], "image_size": 32}
BERT = DynaBERTConfig(
    num_classes=4,
    vocab_size=13,
    max_length=7,
    token_types=3,
    hidden_size=12,
    depths=(1, 2),
    heads=(1, 2, 3),
    ffn=(2, 3, 5, 6, 7, 10),  # of 10 neurons: thirds and quarters
)


def ofa_state(model, *, wrapped=True):
    """The state dict that once-for-all's own program would save for this SuperNet."""
    params, largest = {k: np.asarray(v) for k, v in model.params.items()}, model.space.largest()
    row, offsets = model.statistics[largest], programs.sliced(model.config, largest).offsets
    twice = {"conv": "conv.conv", "bn": "bn.bn", "linear": "linear.linear"} if wrapped else {}
    conv, bn, linear = (twice.get(name, name) for name in ("conv", "bn", "linear"))
    state = {
        f"classifier.{linear}.weight": params["classifier.kernel"].T,
        f"classifier.{linear}.bias": params["classifier.bias"],
    }
    for path in (name.removesuffix(".conv.kernel") for name in params if name.endswith(".conv.kernel")):
        kind, index, *rest = path.split(".")
        theirs = f"blocks.{index}.downsample" if rest == ["shortcut"] else f"blocks.{index}.conv{int((rest or '0')[-1]) + 1}"
        norm = f"block{index}.{'shortcut' if rest == ['shortcut'] else 'conv' + (rest or '0')[-1]}.norm"
        if kind == "stem":
            theirs, norm = f"input_stem.{index}" + (".conv" if index == "1" else ""), f"stem{index}.norm"
        state[f"{theirs}.{conv}.weight"] = params[f"{path}.conv.kernel"].transpose(3, 2, 0, 1)
        state[f"{theirs}.{bn}.weight"] = params[f"{path}.norm.scale"]
        state[f"{theirs}.{bn}.bias"] = params[f"{path}.norm.bias"]
        part = row[:, offsets[norm] :][:, : params[f"{path}.norm.bias"].size]
        state[f"{theirs}.{bn}.running_mean"], state[f"{theirs}.{bn}.running_var"] = part
        state[f"{theirs}.{bn}.num_batches_tracked"] = np.array(7)
    return state


def bert_state(model):
    """The state dict that Hugging Face's BertForSequenceClassification would save for this SuperNet."""
    theirs = {
        "embeddings.words": "bert.embeddings.word_embeddings.weight",
        "embeddings.positions": "bert.embeddings.position_embeddings.weight",
        "embeddings.types": "bert.embeddings.token_type_embeddings.weight",
        "layers": "bert.encoder.layer",
        "embeddings": "bert.embeddings",
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "ffn_norm": "output.LayerNorm",
        "pooler": "bert.pooler.dense",
        "norm": "LayerNorm",
        "scale": "weight",
        "kernel": "weight",
    } | {name: f"attention.self.{name}" for name in ("query", "key", "value")}
    state = {"bert.embeddings.position_ids": np.arange(3)}
    for name, value in model.params.items():
        key = theirs.get(name) or ".".join(theirs.get(part, part) for part in name.split("."))
        state[key] = np.asarray(value).T if name.endswith("kernel") else np.asarray(value)
    return state


def ofa_model():
    """A SuperNet with random weights and statistics, in a form that once-for-all can save."""
    largest = OFA.space().largest()
    return SuperNet(OFA, random_params(OFA), {largest: random_statistics(OFA, largest)})


def bert_model():
    """A SuperNet with random weights, in a form that Hugging Face can save."""
    return SuperNet(BERT, random_params(BERT))


def assert_same_model(actual, expected):
    """Checks that the config, all weights and all statistics are equal, bit by bit."""
    assert actual.config == expected.config
    assert_same_arrays(actual.params, expected.params)
    assert_same_arrays(actual.statistics, expected.statistics)
