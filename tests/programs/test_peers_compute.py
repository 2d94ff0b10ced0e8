"""serve/bench/peers_compute.py on tiny networks: all libraries compute the same, and all figures are there."""

import functools
import sys

import numpy as np
import peers_compute
import pytest
from tiny import TINY, TINY_BERT, random_params, random_statistics, write_export

from superserve_jax import errors
from superserve_jax.supernets.supernet import SuperNet

PROGRAM = "serve/bench/peers_compute.py"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The folders of an export of images and one of texts, each with its largest subnet."""
    folders = []
    for config in (TINY, TINY_BERT):
        largest = config.space().largest()
        model = SuperNet(config, random_params(config), {largest: random_statistics(config, largest)})
        folders.append(write_export(tmp_path_factory.mktemp("export") / config.family, model))
    return folders


def test_single_calls_of_every_library_are_measured(run_program, exports):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    done = run_program(PROGRAM, *exports, "--quick", "--batch-sizes", 3, json_file=True)
    assert [network["family"] for network in done.json["networks"]] == ["ofa_resnet", "dynabert"]
    assert {"jax", "onnxruntime"} <= set(done.json["versions"])
    for network, config in zip(done.json["networks"], (TINY, TINY_BERT), strict=True):
        assert min(network["peak_gflops"].values()) > 0
        assert [case["batch"] for case in network["cases"]] == [3]
        for case in network["cases"]:
            assert case["flops"] == config.flops(config.space().largest())
            assert case["ms"].keys() == {"ours", *done.json["versions"]} - {"jax"}
            assert min(case["ms"].values()) > 0
            assert case["differences"]["onnxruntime"] < 1e-5
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("ONNX Runtime ")]
    assert [row[3] for row in rows] == ["3"] * 2


def test_throughput_is_the_best_arrangements(run_program, exports):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    done = run_program(PROGRAM, exports[0], "--quick", "--batch-sizes", 2, "--throughput", json_file=True)
    [network] = done.json["networks"]
    [case] = network["cases"]
    workers = {"1", str(done.json["cores"])}
    assert {name: set(rates) for name, rates in case["inputs_per_s"].items()} == dict.fromkeys(case["inputs_per_s"], workers)
    assert min(rate for rates in case["inputs_per_s"].values() for rate in rates.values()) > 0
    best = max(case["inputs_per_s"]["ours"].values())
    assert f"{best:.4g} (2 x " in done.stdout


def test_another_library_begins_in_each_round():
    calls, options = [], peers_compute.Options(rounds=4, turn_s=1e-9)
    times = peers_compute.alternate({name: functools.partial(calls.append, name) for name in "abc"}, options)
    turn = 3  # one call that is not counted, and two that are
    assert "".join(calls[::turn]) == "abcbcacababc"
    assert {name: len(ms) for name, ms in times.items()} == {"a": 8, "b": 8, "c": 8}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_call_that_fails_ends_the_other_threads(place):
    def fail():
        raise ValueError("no memory")

    calls = [lambda: np.zeros(1)] * 3
    calls[place] = fail
    with pytest.raises(errors.InferenceError, match="a call failed: ValueError: no memory"):
        peers_compute.batches_per_s(calls, 0.001)


def test_a_call_that_fails_later_is_an_error():
    results = iter([np.zeros(1)])
    with pytest.raises(errors.InferenceError, match="a call failed: StopIteration"):
        peers_compute.batches_per_s([lambda: next(results), lambda: np.zeros(1)], 0.001)


@pytest.mark.parametrize("wrong", [np.full((1, 2), 1.001), np.full((1, 2), np.nan)])
def test_another_network_is_refused(wrong):
    with pytest.raises(errors.InferenceError, match=r"ONNX Runtime differ from ours by .*; at most 0.0001 is allowed"):
        peers_compute.agreement({"ours": np.ones((1, 2)), "onnxruntime": wrong})


def test_logits_of_zero_cannot_be_compared():
    zeros = np.zeros((1, 2))
    with pytest.raises(errors.InferenceError, match="all our logits are 0, so nothing can be compared; use trained weights"):
        peers_compute.agreement({"ours": zeros, "onnxruntime": zeros})


def test_without_a_library_nothing_is_measured(run_program, monkeypatch, exports):
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    error = run_program(PROGRAM, exports[0], "--quick", status=2).stderr
    assert error == "error: no library to compare with is installed: pip install 'superserve-jax[peers]'\n"


def test_without_onnx_nothing_is_measured(run_program, monkeypatch, exports):
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    monkeypatch.setitem(sys.modules, "onnx", None)
    error = run_program(PROGRAM, exports[0], "--quick", status=2).stderr
    assert error == "error: the package onnx is missing: pip install 'superserve-jax[peers]'\n"
