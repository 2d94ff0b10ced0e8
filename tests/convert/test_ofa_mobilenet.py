"""once-for-all's OFA-MobileNetV3: the logits of its subnets, in every form of program, and what is refused.

`tests/data/make_ofa_mobilenet_small.py` made the weights and the logits with once-for-all's own package.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from tracing_checks import FAST

from superserve_jax import convert, errors
from superserve_jax.supernets import programs

DATA = pathlib.Path(__file__).parents[1] / "data"
ARGUMENTS = ("ks_list", "expand_ratio_list", "depth_list", "width_mult", "image_size")


@pytest.fixture(scope="module")
def about():
    return json.loads((DATA / "ofa_mobilenet_small.json").read_text())


@pytest.fixture(scope="module")
def contents():
    with np.load(DATA / "ofa_mobilenet_small.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state(contents):
    return {name.removeprefix("state/"): value for name, value in contents.items() if name.startswith("state/")}


@pytest.fixture(scope="module")
def model(about, state):
    return convert.ofa_mobilenet(state, **{name: about[name] for name in ARGUMENTS})


def test_subnets_compute_what_once_for_all_computes(model, about, contents):
    """One program runs all subnets, with the statistics of the largest one. The first two also have programs of their own."""
    images, masked = contents["x"].transpose(0, 2, 3, 1), programs.masked(model.config)
    run = jax.jit(masked.infer, compiler_options=FAST)
    [shared] = model.statistics.values()
    for i, (arch, expected) in enumerate(zip(about["subnets"], contents["logits"], strict=True)):
        subnet = convert.ofa_mobilenet_subnet(arch, model.config)
        found = run(model.params, images, shared, masked.active(subnet))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        if i < 2:
            program = programs.sliced(model.config, subnet)
            statistics = masked.cut_statistics(shared, subnet)
            shapes = programs.used_leaves(program)
            params = {name: program.cut(name, model.params, shape) for name, shape in shapes.items()}
            alone = jax.jit(program.infer, compiler_options=FAST)
            found = alone(params, images, statistics, program.active(subnet))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    largest, smallest = contents["logits"][:2]
    assert np.abs(largest - smallest).max() > 0.1


def test_the_ends_of_the_space_are_those_of_once_for_all(model, about):
    subnets = [convert.ofa_mobilenet_subnet(arch, model.config) for arch in about["subnets"]]
    assert subnets[:2] == [model.space.largest(), model.space.smallest()]
    assert len(set(subnets)) == len(subnets)


def test_the_file_of_an_older_version_is_read(model, about, state):
    """Published files name blocks and layers as an older version did."""
    older = {}
    for name, value in state.items():
        name = name.replace(".conv.inv", ".mobile_inverted_conv.inv").replace(".conv.depth", ".mobile_inverted_conv.depth")
        name = name.replace(".conv.point", ".mobile_inverted_conv.point")
        older[name.replace(".bn.bn.", ".bn.").replace(".conv.conv.", ".conv.")] = value
    assert any(".mobile_inverted_conv." in name for name in older)
    found = convert.weights(older, model.config)
    assert found.params.keys() == model.params.keys()
    for name, value in found.params.items():
        np.testing.assert_array_equal(value, model.params[name], err_msg=name)


def test_weights_that_do_not_fit_are_refused(about, state):
    arguments = {name: about[name] for name in ARGUMENTS}
    less = {name: value for name, value in state.items() if "7to5" not in name}
    with pytest.raises(errors.ConversionError, match=r"15 missing .*blocks.1.conv.depth_conv.conv.7to5_matrix \(25, 25\)"):
        convert.ofa_mobilenet(less, **arguments)
    with pytest.raises(errors.ConversionError, match=r"of another shape.*was the network made with these arguments"):
        convert.ofa_mobilenet(state, **arguments | {"expand_ratio_list": [3, 4]})
    with pytest.raises(errors.ConfigError, match="mean and std together"):
        convert.ofa_mobilenet(state, **arguments, mean=(0.5, 0.5, 0.5))


def test_a_config_that_once_for_all_does_not_have_is_refused(model, state):
    with pytest.raises(errors.ConfigError, match="has stem_stride=2, got 1"):
        convert.weights(state, dataclasses.replace(model.config, stem_stride=1))


def test_values_of_blocks_that_do_not_run_have_no_meaning(model):
    """once-for-all writes 0 for some of them."""
    arch = {"ks": [3, 5, 7] * 5, "e": [4, 3, 4] * 5, "d": [2, 3, 2, 2, 3]}
    expected = convert.ofa_mobilenet_subnet(arch, model.config)
    runs = [i % 3 < arch["d"][i // 3] for i in range(15)]
    assert runs.count(False) == 3
    for skipped in (0, -1, 99):
        odd = {name: [v if run else skipped for v, run in zip(arch[name], runs, strict=True)] for name in ("ks", "e")}
        assert convert.ofa_mobilenet_subnet({**arch, **odd}, model.config) == expected
        assert convert.ofa_mobilenet_subnet({**arch, "ks": np.array(odd["ks"])}, model.config) == expected


def test_a_subnet_dictionary_may_have_a_number_or_any_kind_of_list(model):
    expected = convert.ofa_mobilenet_subnet({"ks": [5] * 15, "e": [4] * 15, "d": [2, 3, 2, 3, 2]}, model.config)
    for e in (4, 4.0, np.int64(4), np.array(4), (4,) * 15, np.full(15, 4), np.full(15, 4.0), [np.float32(4)] * 15):
        arch = {"ks": (5,) * 15, "e": e, "d": (2, 3, 2, 3, 2), "wid": None, "r": [224]}
        assert convert.ofa_mobilenet_subnet(arch, model.config) == expected


def test_the_lists_of_a_network_may_be_ranges(about, state, model):
    lists = {name: about[name] for name in ARGUMENTS} | {"ks_list": range(7, 2, -2), "depth_list": range(2, 4)}
    assert convert.ofa_mobilenet(state, **lists).config == model.config
    with pytest.raises(errors.ConfigError, match=r"expected a number or a list of numbers, got \[\[2\], \[2, 3\]\]"):
        convert.ofa_mobilenet(state, **lists | {"depth_list": [[2], [2, 3]]})
    for odd in ([[2, 3]], {2, 3}, "3", None, [True], [2, "3"]):
        with pytest.raises(errors.ConfigError, match="expected a number or a list of numbers"):
            convert.ofa_mobilenet(state, **lists | {"depth_list": odd})


@pytest.mark.parametrize(
    ("arch", "error", "message"),
    [
        ({"ks": 3, "e": 4}, errors.SubnetError, "it lacks \\['d'\\]"),
        ({"ks": 3, "e": 4, "d": 2, "w": 1}, errors.UnknownNameError, "'w'"),
        ({"ks": 4, "e": 4, "d": 2}, errors.SubnetError, r"'ks' of a subnet dictionary must be among \[3, 5, 7\], got 4"),
        ({"ks": 3, "e": [4, 3], "d": 2}, errors.SubnetError, r"'e' of a subnet dictionary needs 15 values, got 2: \[4, 3\]"),
        ({"ks": 3, "e": 4, "d": [2, 2, 2, 2, 4]}, errors.SubnetError, r"'d' of a subnet dictionary must be among .*, got 4"),
        ({"ks": 0, "e": 4, "d": 2}, errors.SubnetError, r"'ks' of a subnet dictionary must be among \[3, 5, 7\], got 0"),
        ({"ks": None, "e": 4, "d": 2}, errors.SubnetError, "'ks' of a subnet dictionary must hold numbers, got None"),
        ({"ks": 3, "e": [4, None], "d": 2}, errors.SubnetError, "'e' of a subnet dictionary must hold numbers, got None"),
        ({"ks": [[3], [3, 5]], "e": 4, "d": 2}, errors.SubnetError, r"must hold numbers, got \[3\]"),
        (None, errors.SubnetError, "has the entries 'ks', 'e' and 'd', got None"),
    ],
)
def test_impossible_subnet_dictionaries_are_refused(model, arch, error, message):
    with pytest.raises(error, match=message):
        convert.ofa_mobilenet_subnet(arch, model.config)
