"""Replies to requests for inference: values of all rows, per row on request, as JSON or binary."""

import json

import numpy as np
import pytest
from fakes import SUBNETS
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.gateway import replies
from superserve_jax.gateway.requests import OUTPUTS, InferRequest, Wanted
from superserve_jax.gateway.tensors import DTYPES, RequestError
from superserve_jax.serving import Reply
from superserve_jax.subnet import Subnet

RANKS = {subnet: rank for rank, subnet in enumerate(SUBNETS)}
LOGITS = np.float32([[0.1, 0.9, -3], [5, 4, 5]])
MADE = [
    Reply(LOGITS[0], SUBNETS[0], 0.7, True, 3.0, 1.0, 2.0, 2, ("cat", "dog")),
    Reply(LOGITS[1], SUBNETS[2], 0.8, False, 40.5, 38.25, 2.25, 2, ("cat", "dog")),
]
PER_ROW = {
    "subnet": [0, 2],
    "accuracy": [0.7, 0.8],
    "latency_ms": [3.0, 40.5],
    "queue_ms": [1.0, 38.25],
    "met_slo": [True, False],
}


def written(*wanted, made=MADE, id=""):
    """(the JSON, the binary data of each output that has some)."""
    request = InferRequest(np.zeros(len(made)), id, None, 0.0, wanted or (Wanted("output", False, 0),))
    content, length = replies.write("mine", request, made, RANKS)
    head, rest, data = json.loads(content[:length]), b"" if length is None else content[length:], {}
    for output in head["outputs"]:
        if "data" not in output:
            size = output["parameters"]["binary_data_size"]
            data[output["name"]], rest = rest[:size], rest[size:]
    assert not rest
    return head, data


def test_one_row_as_json():
    assert written(made=MADE[:1], id='a "b"') == (
        {
            "model_name": "mine",
            "model_version": "1",
            "id": 'a "b"',
            "parameters": {"subnet": "0", "accuracy": 0.7, "latency_ms": 3.0, "queue_ms": 1.0, "met_slo": True},
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [1, 3], "data": LOGITS[0].tolist()}],
        },
        {},
    )


def test_the_parameters_of_several_rows_are_those_of_the_worst_row():
    head, _ = written()
    assert head["parameters"] == {"subnet": "0,2", "accuracy": 0.7, "latency_ms": 40.5, "queue_ms": 38.25, "met_slo": False}
    assert head["outputs"][0]["data"] == LOGITS.ravel().tolist()
    assert "id" not in head


@given(st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True), st.data())
def test_outputs_come_in_the_order_of_the_request_each_as_json_or_binary(names, data):
    wanted = [Wanted(name, data.draw(st.booleans()), 0) for name in names]
    head, found = written(*wanted)
    assert [output["name"] for output in head["outputs"]] == names
    for (name, binary, _), output in zip(wanted, head["outputs"], strict=True):
        expected = LOGITS if name == "output" else np.array(PER_ROW[name], DTYPES[output["datatype"]])
        assert output["shape"] == [*expected.shape]
        if binary:
            assert found[name] == expected.tobytes()
        else:
            assert output["data"] == expected.ravel().tolist()


def test_classes_are_texts_of_value_index_and_name():
    head, _ = written(Wanted("output", False, 2))
    [output] = head["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["0.899999976:1:dog", "0.100000001:0:cat", "5:0:cat", "5:2"]
    _, data = written(Wanted("output", True, 99), made=MADE[:1])
    assert data["output"].startswith(b"\x11\x00\x00\x000.899999976:1:dog\x11")


def test_an_output_without_classes_has_no_classification():
    with pytest.raises(RequestError, match="no vector of logits"):
        written(Wanted("output", False, 1), made=[MADE[0]._replace(output=np.int32([1, 2]))])


def test_a_subnet_that_no_profile_has_is_minus_1():
    head, _ = written(made=[MADE[0]._replace(subnet=Subnet((9,)))])
    assert head["parameters"]["subnet"] == "-1"


@pytest.mark.parametrize("outputs", [["a text"], [np.complex64([1])], [np.zeros(2), np.zeros(3)]])
def test_outputs_that_the_protocol_cannot_tell_are_an_error(outputs):
    with pytest.raises(errors.InferenceError):
        written(made=[MADE[0]._replace(output=output) for output in outputs])
