"""Messages of gRPC and requests: every form of the input, and no error that is not the client's."""

import fakes
import gateways
import grpcs
import numpy as np
import pytest
from grpc import StatusCode
from grpcs import message
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.gateway import requests, tensors
from superserve_jax.gateway.grpc import codec
from superserve_jax.gateway.grpc.service import Service
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.tensors import InputTensor
from superserve_jax.gateway.threads import LongWork

ROW = np.uint8([[[7, 2], [3, 4]]])


@pytest.fixture(scope="module")
def model():
    with fakes.serve(gateways.engine()) as server:
        yield ServedModel("supernet", server)


def refusal(model, made):
    found, error = gateways.tried(codec.read, model, made)
    assert found is None
    return str(error)


@pytest.mark.parametrize(
    ("dtype", "typed", "value"),
    [
        ("bool", "bool_contents", True),
        ("int8", "int_contents", -128),
        ("int16", "int_contents", 32767),
        ("int32", "int_contents", -(2**31)),
        ("int64", "int64_contents", -(2**63)),
        ("uint8", "uint_contents", 255),
        ("uint16", "uint_contents", 65535),
        ("uint32", "uint_contents", 2**32 - 1),
        ("uint64", "uint64_contents", 2**64 - 1),
        ("float32", "fp32_contents", 1.5),
        ("float64", "fp64_contents", 0.1),
        ("float16", None, 0.5),
    ],
)
def test_every_datatype_arrives_as_it_was_sent(dtype, typed, value):
    array = np.full((2, 2, 2), value, dtype)
    with fakes.serve(gateways.engine(input_dtype=np.dtype(dtype))) as server:
        model = ServedModel("supernet", server)
        for form in {typed, None}:
            rows = codec.read(model, message(array, typed=form)).rows
            assert rows.dtype == dtype
            assert (rows == array).all()
        wrong = message(array, typed=typed or "fp32_contents")
        wrong.inputs[0].contents.bytes_contents.append(b"a")
        assert f"expected {typed or 'raw_input_contents'}" in refusal(model, wrong)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda made: made.ClearField("inputs"), "0 inputs"),
        (lambda made: made.inputs.add(name="input"), "2 inputs"),
        (lambda made: made.inputs.extend(101 * [made.inputs[0]]), "102 inputs"),
        (lambda made: setattr(made.inputs[0], "name", "image"), "unexpected input 'image'"),
        (lambda made: setattr(made.inputs[0], "datatype", "FP32"), "expected UINT8"),
        (lambda made: setattr(made.inputs[0], "datatype", "BYTES"), "takes UINT8 only"),
        (lambda made: made.inputs[0].shape.append(1), "shape"),
        (lambda made: made.inputs[0].shape.__setitem__(0, -1), "shape"),
        (lambda made: made.raw_input_contents.append(b"abcd"), "2 raw_input_contents"),
        (lambda made: made.ClearField("raw_input_contents"), "0 bytes"),
        (lambda made: made.raw_input_contents.__setitem__(0, b"abc"), "3 bytes"),
        (lambda made: made.inputs[0].contents.uint_contents.append(1), "1 raw_input_contents and ['uint_contents']"),
        (lambda made: made.parameters["slo_ms"], "has no value"),
        (lambda made: setattr(made.parameters["slo_ms"], "string_param", "9"), "got `str`"),
        (lambda made: setattr(made.parameters["timeout"], "int64_param", -1), "timeout"),
        (lambda made: [made.parameters[str(i)] for i in range(101)], "101"),
        (lambda made: setattr(made.inputs[0].parameters["shared_memory_region"], "string_param", "a"), "shared memory"),
        (lambda made: made.outputs.extend(2 * [type(made).InferRequestedOutputTensor(name="output")]), "twice"),
        (lambda made: setattr(made, "id", 1001 * "a"), "1001 characters"),
    ],
)
def test_what_does_not_follow_the_protocol_is_refused(model, change, text):
    made = message(ROW)
    change(made)
    assert text in refusal(model, made)


def test_numbers_that_do_not_fit_are_refused(model):
    assert "256, which does not fit UINT8" in refusal(model, message_of(values=[1, 2, 3, 256]))
    assert "3 bytes, expected 4" in refusal(model, message_of(values=[1, 2, 3]))
    with fakes.serve(gateways.engine(input_dtype=np.float32)) as server:
        floats = ServedModel("supernet", server)
        for value in (np.nan, np.inf):
            for typed in (None, "fp32_contents"):
                assert "finite" in refusal(floats, message(np.full((1, 2, 2), value, np.float32), typed=typed))


def message_of(values):
    made = message(ROW, typed="uint_contents")
    made.inputs[0].contents.ClearField("uint_contents")
    made.inputs[0].contents.uint_contents.extend(values)
    return made


class Texts:
    """A model that takes texts."""

    def read_fields(self, fields, data):
        return requests.from_fields(fields, data, InputTensor((7,), np.dtype(np.int32), any_length=True, texts=2))


@pytest.mark.parametrize("typed", [True, False])
def test_texts_arrive_as_they_were_sent(typed):
    for shape, texts in (([2], ["good film", "\u00e9"]), ([1, 2], ["good", ""])):
        made = message(np.int32([[1]]))
        made.inputs[0].datatype = "BYTES"
        made.inputs[0].shape[:] = shape
        if typed:
            made.ClearField("raw_input_contents")
            made.inputs[0].contents.bytes_contents.extend(text.encode() for text in texts)
        else:
            made.raw_input_contents[0] = tensors.to_bytes(texts)
        assert codec.read(Texts(), made).rows == np.reshape(np.array(texts), (shape[0], -1)).tolist()
    if typed:
        made.inputs[0].contents.bytes_contents[1] = b"\xff"
        assert "no text in UTF-8" in refusal(Texts(), made)


@given(st.data())
def test_whatever_a_client_sends_is_its_own_error(model, data):
    content = bytearray(
        message(ROW, typed=data.draw(st.sampled_from([None, "uint_contents"])), slo_ms=50.0).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.sampled_from([None, -1, 20]))])
    for sent in (content, data.draw(st.binary(max_size=40))):
        _, error = grpcs.call(Service(Repository({"supernet": model}), Limits(), LongWork()).methods(), "ModelInfer", sent)
        assert error is None or error[0] in (StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND)
