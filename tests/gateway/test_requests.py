"""Requests for inference: every field is checked, and whatever comes is either a request or a RequestError."""

import json
import math

import gateways
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from superserve_jax.gateway import requests
from superserve_jax.gateway.requests import Wanted
from superserve_jax.gateway.tensors import InputTensor, RequestError

IMAGE = InputTensor((2, 2), np.dtype(np.uint8))
ROWS = np.uint8([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])


def read(value, tensor=IMAGE):
    return requests.read(value if isinstance(value, bytes) else json.dumps(value).encode(), None, tensor)


def with_input(**fields):
    return {"inputs": [gateways.tensor(ROWS, **fields)]}


def with_parameters(**parameters):
    return with_input() | {"parameters": parameters}


def with_outputs(*outputs, **fields):
    return with_input() | {"outputs": list(outputs)} | fields


# -- the three forms of a body ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_json(form):
    request = read(with_input(form=form) | {"id": "mine"})
    np.testing.assert_array_equal(request.rows, ROWS)
    assert request[1:] == ("mine", None, 0.0, (Wanted("output", False, 0),))


def test_binary_data_behind_the_json():
    content, length = gateways.binary_body(ROWS, parameters={"binary_data_output": True})
    request = requests.read(content, length, IMAGE)
    np.testing.assert_array_equal(request.rows, ROWS)
    assert request.wanted == (Wanted("output", True, 0),)


def test_one_input_alone_is_answered_in_binary():
    request = requests.read(ROWS[0].tobytes(), 0, IMAGE)
    np.testing.assert_array_equal(request.rows, ROWS[:1])
    assert request[1:] == ("", None, 0.0, (Wanted("output", True, 0),))
    for wrong in (b"", bytes(3), bytes(8)):
        with pytest.raises(RequestError, match="expected 4"):
            requests.read(wrong, 0, IMAGE)


def test_one_text_of_token_ids_alone_has_the_length_of_the_body():
    tokens = InputTensor((9, 2), np.dtype(np.int32), any_length=True)
    assert requests.read(bytes(24), 0, tokens).rows.shape == (1, 3, 2)
    for wrong in (b"", bytes(12)):
        with pytest.raises(RequestError, match="multiple of 8"):
            requests.read(wrong, 0, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"binary_data_size": 7}}, "binary_data_size is 7, but 8 bytes follow"),
        ({"parameters": {"binary_data_size": 10**30}}, "Expected `int"),
        ({"parameters": {"binary_data_size": -1}}, ">= 0"),
        ({"parameters": {"binary_data_size": 8.0}}, "Expected `int"),
        ({"parameters": {"binary_data_size": True}}, "Expected `int"),
        ({"parameters": {}}, "has no data"),
        ({"data": [1]}, "`data` and `binary_data_size`; send one of them"),
        ({"data": [1], "parameters": {}}, "8 bytes follow the JSON, but input 'input' has no `binary_data_size`"),
        ({"parameters": {"shared_memory_region": "a"}}, "shared memory is not supported"),
    ],
)
def test_sizes_of_binary_data_must_agree(change, message):
    given = gateways.tensor(ROWS, None, parameters={"binary_data_size": 8}) | change
    head = json.dumps({"inputs": [given]}).encode()
    with pytest.raises(RequestError, match=message):
        requests.read(head + ROWS.tobytes(), len(head), IMAGE)


def test_the_length_of_the_json_must_fit_the_body():
    content, length = gateways.binary_body(ROWS)
    for wrong in (1, length - 1, length + 1, len(content), len(content) + 1, 10**18):
        with pytest.raises(RequestError):
            requests.read(content, wrong, IMAGE)


# -- fields -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not an inference request"),
        (b"[]", "Expected `object`"),
        (b'{"inputs": []} x', "trailing characters"),
        (b"[" * 100_000, "not an inference request"),
        (b'{"inputs": [{"name": "\xff"}]}', "not an inference request"),
        (b'{"inputs": [{"data": ' + b"[" * 100_000, "not an inference request"),
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "has 0 inputs"),
        ({"inputs": [gateways.tensor(ROWS)] * 2}, "has 2 inputs"),
        (with_input(name="x"), "unexpected input 'x'"),
        (with_input(name=5), "Expected `str`"),
        (with_input(datatype="FP32"), "datatype 'FP32', expected UINT8; inputs are never cast"),
        (with_input(datatype="BYTES"), "takes UINT8 only"),
        (with_input(shape=[2, 4]), r"shape \[2, 4\], expected \[-1, 2, 2\]"),
        (with_input(shape=[-1, 2, 2]), r"shape \[-1, 2, 2\]"),
        (with_input(shape=[0, 2, 2]), r"shape \[0, 2, 2\]"),
        (with_input(shape=[2.0, 2, 2]), "Expected `int`, got `float`"),
        (with_input(shape=[True, 2, 2]), "Expected `int`, got `bool`"),
        (with_input(shape=[10**40, 2, 2]), "at most 10,000 may wait; split it"),
        (with_input(data=[256] * 8), "a number beyond UINT8"),
        (with_input(shape=[3, 2, 2]), "has 8 elements"),
        (with_input(data=[1.5] * 8), "got `float`"),
        (with_input(data=None), "opening brackets"),
        (with_input() | {"id": 5}, "Expected `str`"),
        (with_input() | {"id": "x" * 2000}, "at most 1000"),
        (with_parameters(slo_ms=True), r"\$.parameters.slo_ms"),
        (with_parameters(slo_ms="20"), r"\$.parameters.slo_ms"),
        (with_parameters(min_accuracy=False), r"\$.parameters.min_accuracy"),
        (with_parameters(timeout=1.0), r"\$.parameters.timeout"),
        (with_parameters(timeout=-1), r"\$.parameters.timeout"),
        (with_parameters(timeout=10**400), r"\$.parameters.timeout"),
        (with_parameters(timeout=2**63), r"\$.parameters.timeout"),
        (with_parameters(priority=10**400), r"\$.parameters.priority"),
        (with_parameters(priority=-1), r"\$.parameters.priority"),
        (with_parameters(binary_data_output=1), r"\$.parameters.binary_data_output"),
        (with_outputs({"name": "acuracy"}), "unknown output 'acuracy': did you mean 'accuracy'"),
        (with_outputs({"name": "output"}, {"name": "output"}), "names an output twice"),
        (with_outputs({"name": "output", "parameters": {"binary_data": 1}}), "Expected `bool"),
        (with_outputs({"name": "output", "parameters": {"classification": -1}}), ">= 0"),
        (with_outputs({"name": "subnet", "parameters": {"classification": 1}}), "has no classes"),
        (with_outputs({"name": "output", "parameters": {"shared_memory_region": "a"}}), "shared memory"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_every_field_is_checked(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        read(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("parameters", "slo_ms"),
    [
        ({}, None),
        ({"slo_ms": 20}, 20.0),
        ({"slo_ms": 0.5, "timeout": 7}, 0.5),
        ({"timeout": 7000}, 7.0),
        ({"timeout": 0}, None),
        ({"slo_ms": None, "timeout": 500}, 0.5),
        ({"sequence_id": "a", "priority": 3, "anything": [1]}, None),
    ],
)
def test_the_deadline_is_slo_ms_or_else_timeout_in_microseconds(parameters, slo_ms):
    assert read(with_parameters(**parameters)).slo_ms == slo_ms


def test_the_floor_of_the_accuracy():
    assert read(with_parameters(min_accuracy=0.75)).min_accuracy == 0.75


def test_each_output_says_whether_it_is_binary_or_else_the_request_does():
    outputs = (
        {"name": "output"},
        {"name": "subnet", "parameters": {"binary_data": False}},
        {"name": "met_slo", "parameters": {}},
    )
    parameters = {"binary_data_output": True}
    assert read(with_outputs(*outputs, parameters=parameters)).wanted == [
        Wanted("output", True, 0),
        Wanted("subnet", False, 0),
        Wanted("met_slo", True, 0),
    ]
    classes = {"name": "output", "parameters": {"classification": 2, "binary_data": True}}
    assert read(with_outputs(classes)).wanted == [Wanted("output", True, 2)]


# -- headers ------------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=6) | st.text("0123456789.eE+-_ naif", max_size=6).map(str.encode))
@example(b"1e999")
@example(b"1_0")
@example("٣".encode())
def test_a_deadline_in_a_header_is_a_plain_number(value):
    found, error = gateways.tried(requests.slo_of, {b"x-slo-ms": value})
    if error is None:
        assert found == float(value) >= 0
        assert set(value) <= set(b"0123456789.eE+-")
    else:
        assert "X-SLO-Ms" in str(error)
        assert not value.isdigit()


def test_x_slo_ms_comes_before_x_slo_ttft_ms():
    assert requests.slo_of({b"x-slo-ttft-ms": b"7", b"x-slo-ms": b"5"}) == 5.0
    assert requests.slo_of({b"x-slo-ttft-ms": b"7"}) == 7.0
    with pytest.raises(RequestError, match="x-slo-ttft-ms is 'nan'"):
        requests.slo_of({b"x-slo-ttft-ms": b"nan"})


@given(st.binary(max_size=4) | st.integers(0, 10**25).map(lambda n: str(n).encode()))
def test_the_length_in_a_header_is_a_whole_number(value):
    found, error = gateways.tried(requests.json_length, {b"inference-header-content-length": value})
    assert (error is None) == (value.isdigit() and len(value) < 19)
    assert error is not None or found == int(value)


# -- whatever comes -----------------------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FIELDS = ("name", "shape", "datatype", "data", "parameters")
BODY, JSON_LENGTH = gateways.binary_body(ROWS)


@st.composite
def almost_requests(draw):
    """A valid request in which some values are replaced by any other ones."""
    value = with_outputs({"name": "output", "parameters": {}}, id="a", parameters={"slo_ms": 5.0, "timeout": 1})
    places = [(value, k) for k in value] + [(value[k][0], f) for k in ("inputs", "outputs") for f in value[k][0]]
    places += [(value["parameters"], k) for k in ("slo_ms", "min_accuracy", "timeout", "priority", "binary_data_output")]
    for where, name in draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
        where[name] = draw(ANYTHING)
    return json.dumps(value).encode()


def assert_read_or_refused(body, length):
    request, error = gateways.tried(requests.read, body, length, IMAGE)
    if error is None:
        assert request.rows.dtype == np.uint8
        assert request.rows.shape[1:] == (2, 2)
        assert request.slo_ms is None or math.isfinite(request.slo_ms)


@given(almost_requests())
def test_a_request_with_wrong_values_is_read_or_refused(body):
    assert_read_or_refused(body, None)


@given(st.binary(max_size=40), st.none() | st.integers(0, 50))
def test_bytes_are_read_or_refused(body, length):
    assert_read_or_refused(body, length)


@given(
    st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.integers(0, 255)), max_size=3),
    st.integers(0, len(BODY)),
    st.integers(-3, 3),
)
def test_a_damaged_request_is_read_or_refused(flips, kept, shift):
    damaged = bytearray(BODY)
    for place, value in flips:
        damaged[place] = value
    assert_read_or_refused(bytes(damaged[: kept or None]), JSON_LENGTH + shift)
