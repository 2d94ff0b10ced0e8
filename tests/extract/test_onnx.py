"""ONNX graphs give the logits of a plain NumPy network and of the SuperNet."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from three_subnets import CLASSES, KINDS, cases, expected
from tiny import assert_close

from superserve_jax import errors, extract
from superserve_jax.extract import formats
from superserve_jax.extract.extraction import CONTRACT_KEY

onnx = pytest.importorskip("onnx", reason="needs the extra extract")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")


@pytest.fixture(scope="module")
def session(take):
    """A function from the name of a config and an index to a session of ONNX Runtime."""

    @functools.cache
    def session(kind, index):
        content = extract.content(take(kind, index), "onnx")
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    return session


@pytest.fixture
def run(session):
    """A function that runs the ONNX graph of a subnet."""
    return lambda kind, index, inputs: session(kind, index).run(None, {"inputs": inputs})[0]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_logits_of_a_plain_network(models, run, kind, index):
    for inputs in cases(KINDS[kind]):
        assert_close(run(kind, index, inputs), expected(models[kind], index, inputs), 1e-4)


@pytest.mark.parametrize("kind", ["bottleneck", "bert"])
def test_a_graph_gives_the_logits_of_the_supernet(models, run, kind):
    inputs = cases(KINDS[kind])[1]
    assert_close(run(kind, 2, inputs), models[kind](inputs), 1e-5)


def test_an_unknown_token_gives_nan_as_in_the_supernet(models, run):
    inputs = cases(KINDS["bert"])[1]
    inputs[0, 1, 0], inputs[1, 2, 0], inputs[2, 0, 1] = -1, KINDS["bert"].vocab_size, 2
    logits = run("bert", 1, inputs)
    np.testing.assert_array_equal(np.isnan(logits).all(1), [True, True, True, False])
    np.testing.assert_array_equal(np.isnan(models["bert"](inputs, models["bert"].subnets[1])), np.isnan(logits))


def test_padding_does_not_change_logits(run):
    inputs = cases(KINDS["bert"])[3]
    longer = np.zeros((len(inputs), KINDS["bert"].max_length, 2), np.int32)
    longer[:, : inputs.shape[1]] = inputs
    assert_close(run("bert", 2, longer), run("bert", 2, inputs))


def test_only_padding_gives_the_logits_of_the_supernet(models, run):
    nothing = np.zeros_like(cases(KINDS["bert"])[1])
    assert_close(run("bert", 2, nothing), models["bert"](nothing))


def test_too_many_tokens_are_refused(run):
    with pytest.raises(Exception, match=r"BroadcastIterator|dimension"):
        run("bert", 0, np.ones((1, KINDS["bert"].max_length + 1, 2), np.int32))


def test_the_model_has_the_contract_and_symbolic_axes(take, session):
    runtime = session("bert", 1)
    assert json.loads(runtime.get_modelmeta().custom_metadata_map[CONTRACT_KEY]) == take("bert", 1).contract
    [inputs], [logits] = runtime.get_inputs(), runtime.get_outputs()
    assert (inputs.name, inputs.shape, inputs.type) == ("inputs", ["batch", "tokens", 2], "tensor(int32)")
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", 3], "tensor(float)")
    assert take("basic", 2).contract["class_names"] == list(CLASSES)


def test_the_constants_are_the_weights_of_the_subnet(take):
    """Only the layout of kernels differs: ONNX has the axes output, input, height, width."""
    subnet = take("bottleneck", 0)
    graph = onnx.load_from_string(extract.content(subnet, "onnx")).graph
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    for name, value in subnet.weights.items():
        np.testing.assert_array_equal(constants.pop(name), value.transpose(3, 2, 0, 1) if value.ndim == 4 else value)
    assert set(constants) == {"pixels.mean", "pixels.scale"}


def test_a_family_that_derives_from_a_known_one_is_refused(take):
    class OwnConfig(type(KINDS["basic"])):
        family = "own"

    subnet = take("basic", 2)
    fields = {f.name: getattr(KINDS["basic"], f.name) for f in dataclasses.fields(KINDS["basic"])}
    program = dataclasses.replace(subnet.program, config=OwnConfig(**fields))
    with pytest.raises(
        errors.ExportError, match="families ofa_resnet and dynabert, not 'own'; give the format stablehlo to run"
    ):
        formats.content(dataclasses.replace(subnet, program=program), "onnx")
