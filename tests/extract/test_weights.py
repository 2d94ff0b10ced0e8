"""A safetensors file has the weights of one subnet, with which plain NumPy networks give the logits."""

import json

import numpy as np
import plain
import pytest
import safetensors
from three_subnets import CLASSES, KINDS, WORDS, cases, expected
from tiny import assert_close

from superserve_jax import extract
from superserve_jax.extract import formats


def read(path):
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["superserve"])  # noqa: SIM118


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_weights_of_an_ofa_resnet_make_a_plain_network_without_norms(models, tmp_path, index):
    model, config = models["bottleneck"], KINDS["bottleneck"]
    extract.write(tmp_path / "a.safetensors", model, index)
    weights, contract = read(tmp_path / "a.safetensors")
    convs = [name.removesuffix(".conv.kernel") for name in weights if name.endswith(".conv.kernel")]
    assert set(weights) == {f"{c}.conv.{n}" for c in convs for n in ("kernel", "bias")} | {
        "classifier.kernel",
        "classifier.bias",
    }
    plain_norms = {f"{c}.norm.scale": np.ones_like(weights[f"{c}.conv.bias"]) for c in convs}
    plain_norms |= {f"{c}.norm.bias": weights[f"{c}.conv.bias"] for c in convs}
    n = model.statistics_of(model.subnets[index]).shape[1]
    identity = np.stack([np.zeros(n), np.full(n, 1 - 1e-5)])
    for inputs in cases(config):
        logits = plain.network(config, weights | plain_norms, model.subnets[index], inputs, identity)
        assert_close(logits, expected(model, index, inputs), 1e-4)
    folded = sum(weights[f"{c}.conv.bias"].size for c in convs)  # scale and bias of a norm are one bias now
    assert sum(value.size for value in weights.values()) == contract["params"] - folded


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_weights_of_a_dynabert_make_a_plain_network(models, tmp_path, index):
    extract.write(tmp_path / "a.safetensors", models["bert"], index)
    weights, contract = read(tmp_path / "a.safetensors")
    assert sum(value.size for value in weights.values()) == contract["params"]
    inputs = cases(KINDS["bert"])[1]
    logits = plain.network(KINDS["bert"], weights, models["bert"].subnets[index], inputs, None)
    assert_close(logits, expected(models["bert"], index, inputs), 1e-5)


def test_the_contract_says_what_inputs_must_be(models, take):
    images = take("basic", 0).contract
    assert images["input"] | {"about": ""} == {"name": "inputs", "shape": ["batch", 9, 9, 1], "dtype": "uint8", "about": ""}
    pixels = "Raw pixels from 0 to 255, channels last. "
    assert images["input"]["about"] == f"{pixels}The network itself scales and normalises them with mean and std."
    weights = formats.contract_of(take("basic", 0), "safetensors")
    assert weights["input"]["about"] == f"{pixels}Compute (x / 255 - mean) / std first; mean and std are in config."
    assert weights | {"input": images["input"]} == images
    assert images["class_names"] == list(CLASSES)
    assert (images["accuracy"], images["measured"], images["index"], images["served_subnets"]) == (0.5, "made up", 0, 3)
    assert images["subnet"] == models["basic"].subnets[0].to_json()
    assert images["vocabulary"] is None
    assert images["norm_epsilon"] == 1e-5
    assert take("float32", 2).contract["input"]["about"] == "Normalised images, channels last."
    texts = extract.take(models["bert"], -1).contract
    assert (texts["index"], texts["input"]["shape"], texts["input"]["dtype"]) == (2, ["batch", "tokens", 2], "int32")
    assert texts["input"]["about"] == (
        "inputs[..., 0] are token ids, inputs[..., 1] token types. Token ids are from 0 to 10. Token types are from 0 to 1. "
        "Positions with id 0 are padding: no token attends to them, unless a sequence is all padding. Pad the sequences of a "
        "batch at the end to one length, from 1 to 6 tokens. More padding does not change the logits."
    )
    assert {name: texts["input"][name] for name in ("max_length", "vocab_size", "pad_id", "token_types")} == {
        "max_length": 6,
        "vocab_size": 11,
        "pad_id": 0,
        "token_types": 2,
    }
    assert texts["vocabulary"] == {"scheme": "words", "lowercase": True, "tokens": list(WORDS.tokens)}
    assert take("one_type", 2).contract["input"]["shape"] == ["batch", "tokens"]
