"""Weights of other projects: logits of the fixtures, networks of random sizes in both directions, and every error.

One file because both networks go through the same tests.
"""

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
import published
import pytest
from jax.experimental.layout import Layout
from published import BERT, OFA, OFA_LISTS, assert_same_model, bert_state, ofa_state
from tiny import random_params, random_statistics, write_export

from superserve_jax import convert, errors, exports
from superserve_jax.engines import executables
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.family import SequenceConfig
from superserve_jax.supernets.supernet import SuperNet

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def ofa_model():
    return published.ofa_model()


@pytest.fixture(scope="module")
def bert_model():
    return published.bert_model()


# -- logits that the other projects computed ----------------------------------------------------------------------------


def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        contents = dict(arrays)
    state = {k.removeprefix("state/"): v for k, v in contents.items() if k.startswith("state/")}
    return json.loads((FIXTURES / f"{name}.json").read_text()), state, contents


def ofa_fixture():
    meta, state, contents = fixture("ofa_resnet_small")
    model = convert.ofa_resnet(state, **{name: meta[name] for name in OFA_LISTS})
    subnet_list = [convert.ofa_subnet(arch, model.space) for arch in meta["subnets"]]
    return model, subnet_list, contents["x"].transpose(0, 2, 3, 1), contents["logits"]


def bert_fixture():
    meta, state, contents = fixture("bert_small")
    model = convert.bert(state, num_heads=meta["num_heads"])
    gates = [[int(i in s["layers"]) for i in range(meta["num_layers"])] for s in meta["subnets"]]
    subnet_list = [
        model.space.subnet(gates=g, heads=s["heads"], ffn=s["ffn"]) for g, s in zip(gates, meta["subnets"], strict=True)
    ]
    inputs = model.config.pack(contents["input_ids"], contents["token_type_ids"], mask=contents["attention_mask"])
    return model, subnet_list, inputs, contents["logits"]


@pytest.mark.parametrize("read", [pytest.param(ofa_fixture, marks=pytest.mark.slow), bert_fixture])
def test_logits_of_the_fixtures_agree_before_and_after_an_export(read, tmp_path):
    model, subnet_list, inputs, logits = read()
    statistics = {s: model.statistics_of(s, norm="shared") for s in subnet_list}
    loaded = exports.load(write_export(tmp_path / "export", SuperNet(model.config, model.params, statistics)))
    for subnet, expected in zip(subnet_list, logits, strict=True):
        tolerance = {"rtol": 0, "atol": 1e-4 * np.abs(expected).max()}
        np.testing.assert_allclose(model(inputs, subnet, norm="shared"), expected, **tolerance)
        np.testing.assert_allclose(loaded(inputs, subnet), expected, **tolerance)


@pytest.mark.slow
def test_logits_of_a_fixture_agree_if_the_norms_are_folded():
    model, subnet_list, inputs, logits = ofa_fixture()
    program = programs.masked(model.config)
    run = jax.jit(lambda params, rows, active: program.infer_folded(program.fold(params, rows), inputs, rows, active))
    for subnet, expected in zip(subnet_list, logits, strict=True):
        statistics = program.pad_statistics(model.statistics_of(subnet, norm="shared"), subnet)
        np.testing.assert_allclose(
            run(model.params, statistics, program.active(subnet)), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
        )


@pytest.mark.slow
@pytest.mark.parametrize("read", [ofa_fixture, bert_fixture])
def test_logits_of_the_fixtures_agree_in_a_prepared_engine(read, monkeypatch):
    """Statistics are folded and layouts chosen, as on a GPU. Here the engine chooses reversed axes."""
    model, subnet_list, inputs, logits = read()
    monkeypatch.setattr(executables, "free_layout", lambda axes: Layout(tuple(range(axes))[::-1]))
    statistics = {s: model.statistics_of(s, norm="shared") for s in subnet_list}
    model = SuperNet(model.config, model.params, statistics)
    lengths = (inputs.shape[1],) if isinstance(model.config, SequenceConfig) else ()
    shapes = {"batch_sizes": (len(inputs),), "lengths": lengths, "slice_bytes": 1 << 30}
    engine = DeviceEngine(model, jax.devices()[0], subnet_list=subnet_list, prepared=True, **shapes)
    for subnet, expected in zip(subnet_list, logits, strict=True):
        outputs = engine.run(subnet, len(inputs), list(np.asarray(inputs)))
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# -- both directions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["its own keys", "the published keys"])
def test_an_ofa_resnet_survives_being_written_as_once_for_all_does(ofa_model, wrapped):
    model = convert.ofa_resnet(ofa_state(ofa_model, wrapped=wrapped), **OFA_LISTS)
    assert_same_model(model, ofa_model)


def test_the_order_of_the_lists_does_not_matter_and_one_may_be_a_number():
    config = dataclasses.replace(OFA, stem_depths=(1,), depths=((3,), (3,), (5,), (3,)), num_classes=1)
    largest = config.space().largest()
    expected = SuperNet(config, random_params(config), {largest: random_statistics(config, largest)})
    lists = {**OFA_LISTS, "depth_list": 1, "expand_ratio_list": (0.5, 0.25), "width_mult_list": [0.1, 0.06, 0.1]}
    assert_same_model(convert.ofa_resnet(ofa_state(expected), **lists), expected)


def test_with_mean_and_std_the_supernet_takes_raw_pixels(ofa_model):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = convert.ofa_resnet(ofa_state(ofa_model), **OFA_LISTS, mean=mean, std=std)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    normalised = ((pixels / 255 - mean) / std).astype(np.float32)
    largest = model.space.largest()
    np.testing.assert_allclose(model(pixels, largest), ofa_model(normalised, largest), rtol=1e-4, atol=1e-5)


def test_a_bert_s_space_and_length_can_be_narrowed(bert_model):
    model = convert.bert(bert_state(bert_model), num_heads=3, depths=[2], heads=[3, 2], ffn=[10, 5], max_length=4)
    assert model.config == dataclasses.replace(BERT, depths=(2,), heads=(2, 3), ffn=(5, 10), max_length=4)
    inputs = BERT.pack([[1, 2, 3, 4]], length=4)
    longer = np.pad(inputs, ((0, 0), (0, 3), (0, 0)))
    np.testing.assert_allclose(
        model(inputs, model.space.largest()), bert_model(longer, BERT.space().largest()), rtol=1e-4, atol=1e-5
    )


def test_layer_norms_may_have_the_names_from_tensorflow(bert_model):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, value in bert_state(bert_model).items():
        for new, ancient in old.items():
            name = name.replace(new, ancient)
        state[name] = value
    assert_same_model(convert.bert(state, num_heads=3), bert_model)


def test_a_bert_survives_being_written_as_hugging_face_does_and_shares_no_memory_with_the_state(bert_model):
    state = {k: v.copy() for k, v in bert_state(bert_model).items()}
    model = convert.bert(state, num_heads=3)
    for value in state.values():
        value[...] = 0
    assert_same_model(model, bert_model)


def test_weights_can_be_converted_for_a_given_config(ofa_model, bert_model):
    assert_same_model(convert.weights(ofa_state(ofa_model), OFA), ofa_model)
    narrow = dataclasses.replace(BERT, heads=(3,), max_length=5)
    model = convert.weights(bert_state(bert_model), narrow)
    assert model.config == narrow
    np.testing.assert_array_equal(model.params["embeddings.positions"], bert_model.params["embeddings.positions"][:5])


# -- subnet dictionaries ------------------------------------------------------------------------------------------------


def test_subnet_dictionaries_convert_both_ways():
    space = OFAResNetConfig().space()
    for k in range(50):
        subnet = space.sample(0, k)
        arch = json.loads(json.dumps(convert.ofa_arch(subnet, space)))
        assert convert.ofa_subnet(arch, space) == subnet


def test_a_subnet_dictionary_means_the_same_as_in_once_for_all():
    space = OFAResNetConfig().space()
    arch = {"d": [1, 0, 1, 2, 0], "e": [0.2, 0.25, 0.35] * 6, "w": [0, 1, 2, 0, 1, 2], "image_size": 176}
    subnet = convert.ofa_subnet(arch, space)
    assert subnet.gates == (0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)
    assert subnet["width"] == (0.65, 0.8, 1.0, 0.65, 0.8, 1.0)
    assert subnet["expand"][:4] == (0.2, 0.25, 0.2, 0.2)  # blocks that do not run have the smallest ratio
    assert convert.ofa_arch(subnet, space)["d"] == [0, 0, 1, 2, 0]
    assert convert.ofa_subnet({"d": 2, "e": 0.35, "w": 2}, space) == space.largest()
    zeros = [ratio * int(gate) for ratio, gate in zip(arch["e"], subnet.gates[1:], strict=True)]
    assert zeros.count(0) == 5
    assert convert.ofa_subnet({**arch, "e": zeros}, space) == subnet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": [2, 2]}, "'d' of a subnet dictionary needs 5 values, got 2"),
        ({"d": [3, 0, 0, 0, 0]}, r"'d' of a subnet dictionary must be among \[0, 1, 2\], got 3"),
        ({"w": [0, 0, 0, 0, 0, 3]}, r"'w' of a subnet dictionary must be among \[0, 1, 2\], got 3"),
        ({"w": -1}, "'w'"),
        ({"w": 0.65}, "'w'"),
        ({"e": 0.3}, "0.3 is not one of"),
        ({"e": [None] * 18}, "'e' of a subnet dictionary must hold numbers, got None"),
        ({"e": None}, "'e' of a subnet dictionary must hold numbers, got None"),
        ({"e": [[0.2], [0.2, 0.25]]}, r"'e' of a subnet dictionary must hold numbers, got \[0.2\]"),
        ({"e": "0.2"}, "must hold numbers, got '0.2'"),
        ({"e": float("nan")}, "must hold numbers, got nan"),
        ({"e": 10**400}, "must hold numbers, got 1000"),
        ({"d": True}, "must hold numbers, got True"),
        ({"d": {}}, "must hold numbers, got {}"),
        ({"e": [0] * 18}, "0.0 is not one of"),
        ({"ks": 3}, "unknown entry of a subnet dictionary 'ks'"),
    ],
)
def test_a_subnet_dictionary_that_does_not_fit_is_refused(change, message):
    space = OFAResNetConfig().space()
    with pytest.raises(errors.SuperServeError, match=message):
        convert.ofa_subnet({"d": 2, "e": 0.35, "w": 2, **change}, space)


def test_a_subnet_dictionary_needs_all_its_entries_and_the_right_space():
    with pytest.raises(errors.SubnetError, match=r"needs 'd', 'e' and 'w'; it lacks \['w'\]"):
        convert.ofa_subnet({"d": 2, "e": 0.35}, OFAResNetConfig().space())
    with pytest.raises(errors.SubnetError, match=r"has the entries 'd', 'e' and 'w', got \[2\]"):
        convert.ofa_subnet([2], OFAResNetConfig().space())
    for space in (BERT.space(), dataclasses.replace(OFA, depths=((2,), (2, 3), (4,), (2,))).space()):
        with pytest.raises(errors.SubnetError, match="need the space of an OFA-ResNet50"):
            convert.ofa_subnet({"d": 0, "e": 0.25, "w": 0}, space)


# -- errors -------------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_with_an_ofa_resnet_is_in_one_line(ofa_model):
    state = ofa_state(ofa_model, wrapped=False)
    del state["blocks.3.conv2.conv.weight"]
    state["blocks.99.conv1.conv.weight"] = np.zeros((1, 2, 3, 4), np.float32)
    state["input_stem.1.conv.bn.bias"] = np.zeros(5, np.float32)
    state["blocks.0.conv1.bn.running_var"] = np.full(16, np.nan, np.float32)
    with pytest.raises(errors.ConversionError) as caught:
        convert.ofa_resnet(state, **OFA_LISTS)
    assert str(caught.value) == (
        "4 of the weights do not fit an OFA-ResNet of depth_list=[0, 1], expand_ratio_list=[0.25, 0.5] and "
        "width_mult_list=[0.06, 0.1]: "
        "1 missing (blocks.3.conv2.conv.conv.weight or blocks.3.conv2.conv.weight (24, 24, 3, 3)); "
        "1 of another shape (input_stem.1.conv.bn.bias (5,) instead of (8,)); "
        "1 not finite (blocks.0.conv1.bn.running_var); "
        "1 surplus (blocks.99.conv1.conv.weight (1, 2, 3, 4)); was the network made with these lists?"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depth_list": [0, 1, 2]}, "the number of blocks (the sum of the largest of model.depths) must be 14, got 18"),
        ({"depth_list": [0]}, "the number of blocks (the sum of the largest of model.depths) must be 14, got 10"),
        ({"expand_ratio_list": [0.25]}, "208 x the largest of model.expand_ratios must be 104, got 56"),
        ({"width_mult_list": [0.2]}, "2048 x the largest of model.width_mults must be 208, got 408"),
    ],
)
def test_a_list_that_is_not_the_network_s_is_named_in_one_line(ofa_model, change, expected):
    with pytest.raises(errors.ConversionError) as caught:
        convert.ofa_resnet(ofa_state(ofa_model), **{**OFA_LISTS, **change})
    assert str(caught.value) == (
        f"the weights are of an OFA-ResNet50 with other sizes than the config: {expected}; change the config, or give other "
        "weights"
    )


def test_sizes_of_a_bert_that_are_not_the_config_s_are_named_in_one_line(bert_model):
    other = dataclasses.replace(BERT, num_classes=2, hidden_size=24, depths=(1, 2, 4), max_length=9)
    with pytest.raises(errors.ConversionError) as caught:
        convert.weights(bert_state(bert_model), other)
    assert str(caught.value) == (
        "the weights are of a BERT classifier with other sizes than the config: model.num_classes must be 4, got 2, "
        "model.hidden_size must be 12, got 24, the largest of model.depths must be 2, got 4, model.max_length must be at most "
        "7, got 9; change the config, or give other weights"
    )


def test_everything_that_is_wrong_with_a_bert_is_in_one_line(bert_model):
    state = bert_state(bert_model)
    del state["bert.encoder.layer.0.output.dense.bias"]
    state["cls.predictions.bias"] = np.zeros(13, np.float32)
    state["bert.embeddings.word_embeddings.weight"] = np.zeros((13, 9), np.float32)
    state["bert.encoder.layer.1.output.LayerNorm.bias"] = np.zeros(2, np.float32)
    with pytest.raises(errors.ConversionError) as caught:
        convert.bert(state, num_heads=3)
    assert str(caught.value) == (
        "4 of the weights do not fit a BERT classifier of 2 layers, hidden size 12 and 10 feed-forward neurons: "
        "1 missing (bert.encoder.layer.0.output.dense.bias (12,)); "
        "2 of another shape (bert.embeddings.word_embeddings.weight (13, 9) instead of (13, 12), "
        "bert.encoder.layer.1.output.LayerNorm.bias (2,) instead of (12,)); "
        "1 surplus (cls.predictions.bias (13,)); are they from a BertForSequenceClassification of these sizes?"
    )


def test_the_weights_of_another_network_are_refused(ofa_model, bert_model):
    with pytest.raises(errors.ConversionError, match="are they from a BertForSequenceClassification"):
        convert.bert(ofa_state(ofa_model), num_heads=3)
    with pytest.raises(errors.ConversionError, match=r"247 missing .* and 245 more\); 41 surplus"):
        convert.ofa_resnet(bert_state(bert_model), **OFA_LISTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size must be a multiple of the 5 heads, got 12"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1 up"),
        ({"max_length": 8}, "the weights have 7 positions"),
        ({"max_length": 0}, "max_length must be a whole number from 1 up"),
        ({"depths": [1]}, "the largest of depths must be the size of the weights, 2"),
        ({"heads": [4]}, "the largest of heads must be the size of the weights, 3"),
        ({"ffn": []}, "the largest of ffn must be the size of the weights, 10"),
    ],
)
def test_an_impossible_argument_for_a_bert_is_refused(bert_model, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        convert.bert(bert_state(bert_model), **{"num_heads": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "give mean and std together"),
        ({"mean": (0.5,), "std": (1.0,)}, "mean needs 3 values"),
        ({"depth_list": [-1, 1]}, "depth_list must hold whole numbers from 0 up"),
        ({"depth_list": [0.5]}, "depth_list must hold whole numbers from 0 up"),
        ({"depth_list": []}, "depth_list must hold whole numbers from 0 up"),
        ({"width_mult_list": [0.0, 1.0]}, "width_mults must be positive"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_an_impossible_argument_for_an_ofa_resnet_is_refused(ofa_model, changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        convert.ofa_resnet(ofa_state(ofa_model), **{**OFA_LISTS, **changes})


def test_a_config_that_does_not_fit_the_other_project_s_network_is_refused(ofa_model, bert_model):
    with pytest.raises(errors.ConfigError, match="once-for-all's OFA-ResNet has stem_stride=2, got 1"):
        convert.weights(ofa_state(ofa_model), dataclasses.replace(OFA, stem_stride=1))
    with pytest.raises(errors.ConversionError, match=r"model\.max_length must be at most 7, got 9"):
        convert.weights(bert_state(bert_model), dataclasses.replace(BERT, max_length=9))
    with pytest.raises(errors.UnknownNameError, match="unknown family with weights of other projects 'toy'"):
        convert.weights({}, types.SimpleNamespace(family="toy"))


def test_a_weight_under_both_of_its_names_is_surplus(ofa_model):
    state = {**ofa_state(ofa_model), "classifier.linear.bias": np.zeros(5, np.float32)}
    with pytest.raises(errors.ConversionError, match=r"1 surplus \(classifier\.linear\.bias \(5,\)\)"):
        convert.ofa_resnet(state, **OFA_LISTS)
