"""Networks written as plain functions: which axes change together, and equality with the same network built small."""

import jax.numpy as jnp
import numpy as np
import pytest
from tracing_checks import check, random_params, random_sizes
from tracing_models import EQUAL, MODELS

from superserve_jax import tracing

FOUND = {  # {group: (size, parameters that it cuts)}
    "mlp": {"w1[1]": (8, "b1 bias scale w1 w2"), "w2[1]": (10, "b2 w2 w3")},
    "attention_three_heads_features": {"shape[0]": (4, "bias out qkv shape"), "shape[1]": (3, "bias out qkv shape")},
    "attention_heads_three_features": {
        "shape[0]": (4, "bias out qkv shape"),
        "qkv[1].1": (3, "bias qkv"),  # features of queries and keys
        "shape[1]": (3, "bias out qkv shape"),  # features of values
    },
    "attention_split_columns": {
        "shape[0]": (4, "bias out qkv shape"),
        "qkv[1].1": (3, "bias qkv"),
        "shape[1]": (3, "bias out qkv shape"),
    },
    "grouped_queries": {
        "k[1]": (2, "k out q v"),
        "k[2]": (4, "k q"),
        "out[0].1": (3, "out q"),  # queries per head of keys
        "v[2]": (4, "out v"),
    },
    "cnn": {"conv[3]": (4, "bias conv dense"), "dense[2]": (7, "dense head")},
    "depthwise": {"depthwise[3]": (6, "bias depthwise excite expand project squeeze"), "squeeze[1]": (4, "excite squeeze")},
    "group_norm": {
        "grouped[1]": (3, "first grouped head shape"),  # channels of a group
        "shape[1]": (4, "first grouped shape"),
        "grouped[2]": (2, "grouped head"),
    },
    "dense_net": {
        "first[1]": (4, "first head second third"),
        "second[1]": (5, "head second third"),
        "third[1]": (3, "head third"),
    },
    "scanned": {
        "first[1]": (8, "first last layers.bias layers.down layers.scale layers.up"),
        "layers.up[2]": (10, "layers.down layers.up"),
    },
    "tied": {
        "block.down[0]": (6, "block.down block.gate_up"),
        "embedding[1]": (8, "block.down block.gate_up block.scale embedding positions"),
    },
    "unet": {"down[1]": (4, "down middle up"), "middle[0].1": (5, "middle"), "middle[1]": (5, "middle up")},
}


def model(name):
    function, shapes, inputs = MODELS[name]
    params = random_params(shapes)
    return function, params, inputs, tracing.trace(function, params, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_axes_that_change_together_are_found(name):
    *_, traced = model(name)
    found = {
        name: (group.size, " ".join(dict.fromkeys(p.parameter for p in group.places))) for name, group in traced.groups.items()
    }
    assert found == FOUND[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_at_other_sizes_is_the_small_model(name):
    function, params, inputs, traced = model(name)
    check(function, params, inputs, random_sizes(traced, 1, EQUAL.get(name, ())), traced=traced)


def test_one_matrix_for_query_key_and_value_is_cut_in_each_of_its_parts():
    """By hand: 2 of 4 heads, and 2 of the 3 features of each."""
    function, params, inputs, traced = model("attention_three_heads_features")
    columns = np.asarray([part * 12 + head * 3 + feature for part in range(3) for head in range(2) for feature in range(2)])
    small = {
        "shape": params["shape"][:2, :2],
        "qkv": params["qkv"][:, columns],
        "bias": params["bias"][columns],
        "out": params["out"][columns[:4]],
    }
    check(function, params, inputs, {"shape[0]": 2, "shape[1]": 2}, traced=traced, small=small)


def test_a_flattened_image_is_cut_in_each_of_its_pixels():
    """By hand: 3 of 4 channels of each of the 9 pixels."""
    function, params, inputs, traced = model("cnn")
    small = params | {"conv": params["conv"][..., :3], "bias": params["bias"][:3], "dense": params["dense"][:, :3]}
    check(function, params, inputs, {"conv[3]": 3}, traced=traced, small=small)


def test_whole_sizes_give_the_same_bits():
    function, params, inputs, traced = model("tied")
    np.testing.assert_array_equal(traced.evaluate(params, inputs, {}), function(params, inputs))


def test_one_masked_program_runs_all_sizes():
    function, params, inputs, traced = model("mlp")
    for size in (1, 5, 8):
        found = traced.evaluate(params, inputs, {"w1[1]": (8, jnp.int32(size))})
        expected = function(traced.cut(params, {"w1[1]": size}), inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
