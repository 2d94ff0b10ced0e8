"""Tensors of the protocol: what is sent is what arrives, and nothing is cast."""

import json
import math

import gateways
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from superserve_jax.gateway import tensors
from superserve_jax.gateway.tensors import DTYPES, InputTensor, RequestError

SHAPES = array_shapes(min_dims=0, max_dims=3, max_side=3)
FORMS = ("flat", "nested", "binary")


def tensor_of(array, **options):
    return InputTensor(array.shape[1:], array.dtype, **options)


def sent(array, form, tensor=None, shape=None):
    """The array as it arrives, if a client sends it in a form."""
    tensor, shape = tensor or tensor_of(array), [*array.shape] if shape is None else shape
    if form == "binary":
        return tensors.from_bytes(tensor, shape, array.tobytes())
    return tensors.from_json(tensor, shape, raw(array.tolist() if form == "nested" else array.ravel().tolist()))


def raw(value):
    return msgspec.Raw(json.dumps(value).encode())


@st.composite
def batches(draw):
    """An array (N, ...) of any dtype that the protocol has."""
    dtype, shape = draw(st.sampled_from([*DTYPES.values()])), (draw(st.integers(1, 3)), *draw(SHAPES))
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return draw(arrays(dtype, shape, elements=elements))


@given(batches(), st.sampled_from(FORMS))
def test_every_array_arrives_as_it_was_sent(array, form):
    found = sent(array, form)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)


NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-300, 300) | st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = NUMBERS | st.booleans() | st.none() | st.text(max_size=3) | st.lists(st.integers(0, 1), max_size=2)


def fits(value, dtype):
    """Whether a JSON value is one of a dtype, as the protocol defines it."""
    if dtype.kind == "b":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if dtype.kind == "f":
        return abs(value) < 2 * float(np.finfo(dtype).max) and bool(np.isfinite(dtype.type(float(value))))
    return isinstance(value, int) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


@given(st.sampled_from([*DTYPES]), st.lists(JSON_VALUES, min_size=1, max_size=4))
def test_a_json_value_is_taken_exactly_if_its_type_and_size_fit(name, values):
    tensor = InputTensor((), DTYPES[name])
    with np.errstate(over="ignore"):
        expected = all(fits(value, tensor.dtype) for value in values)
    found, _ = gateways.tried(tensors.from_json, tensor, [len(values)], raw(values))
    assert (found is not None) == expected
    if expected:
        np.testing.assert_array_equal(found, np.array([tensor.dtype.type(value) for value in values]))


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", "[1.5]"),
        ("UINT8", "[true]"),
        ("UINT8", '["5"]'),
        ("UINT8", "[256]"),
        ("UINT8", "[-1]"),
        ("UINT8", "[1.0]"),
        ("UINT64", "[18446744073709551616]"),
        ("INT32", "[2147483648]"),
        ("FP16", "[70000.0]"),
        ("FP32", "[1e39]"),
        ("FP64", "[1e400]"),
        ("FP32", "[NaN]"),
        ("FP32", "[true]"),
        ("BOOL", "[1]"),
        *(("UINT8", data) for data in ("[]", "5", "null", '"5"', "{}", "[[5]]", "[5, 6]", "[[[5]]]")),
    ],
)
def test_nothing_is_cast(datatype, data):
    with pytest.raises(RequestError, match=r"\w.*\w"):
        tensors.from_json(InputTensor((), DTYPES[datatype]), [1], msgspec.Raw(data.encode()))


@pytest.mark.parametrize("data", ["[[1,2],[3]]", "[[1,2,3,4]]", "[[1],[2],[3],[4]]", "[[1,2],3,4]", "[1,2,[3,4]]"])
def test_nested_lists_have_the_shape(data):
    with pytest.raises(RequestError):
        tensors.from_json(InputTensor((2,), DTYPES["INT8"]), [2, 2], msgspec.Raw(data.encode()))


@given(st.lists(st.integers(-2, 4) | st.integers(-(10**30), 10**30), max_size=4), st.sampled_from(["json", "binary"]))
def test_a_shape_is_a_batch_of_inputs(shape, form):
    tensor, right = InputTensor((2, 1), DTYPES["UINT8"]), len(shape) == 3 and shape[0] >= 1 and shape[1:] == [2, 1]
    count = math.prod(shape) if right and math.prod(shape) < 100 else 6
    read, data = (tensors.from_json, raw([1] * count)) if form == "json" else (tensors.from_bytes, bytes(count))
    found, _ = gateways.tried(read, tensor, shape, data)
    assert (found is not None) == (right and count == math.prod(shape))
    assert found is None or found.shape == tuple(shape)


@given(st.integers(1, 3), st.integers(0, 9))
def test_token_ids_have_any_length(rows, length):
    tensor, array = InputTensor((7,), DTYPES["INT32"], any_length=True), np.ones((rows, length), np.int32)
    if length:
        assert all((sent(array, form, tensor) == array).all() for form in FORMS)
    else:
        with pytest.raises(RequestError, match=r"expected \[-1, -1\].*number of tokens"):
            sent(array, "flat", tensor)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["FP16", "FP32", "FP64"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(RequestError, match="send finite numbers"):
        sent(np.array([[0, value]], DTYPES[name]), "binary")


@pytest.mark.parametrize("size", [0, 3, 5, 8])
def test_binary_data_has_the_size_of_the_shape(size):
    with pytest.raises(RequestError, match=f"has {size} bytes, expected 4"):
        tensors.from_bytes(InputTensor((2, 2), DTYPES["UINT8"]), [1, 2, 2], bytes(size))


def test_a_boolean_byte_is_0_or_1():
    with pytest.raises(RequestError, match="other than 0 and 1"):
        tensors.from_bytes(InputTensor((2,), DTYPES["BOOL"]), [1, 2], b"\x01\x02")


TEXTS = InputTensor((7, 2), DTYPES["INT32"], any_length=True, texts=2)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.sampled_from(["one", "column", "pairs"]))
def test_texts_arrive_as_they_were_sent(texts, form):
    if form == "pairs":
        texts = texts * 2
        groups, shape = [texts[i : i + 2] for i in range(0, len(texts), 2)], [len(texts) // 2, 2]
    else:
        groups, shape = [[text] for text in texts], [len(texts)] if form == "one" else [len(texts), 1]
    assert tensors.texts_from_bytes(TEXTS, shape, tensors.to_bytes(texts)) == groups
    assert tensors.texts_from_json(TEXTS, shape, raw(texts)) == groups
    if form != "one":
        assert tensors.texts_from_json(TEXTS, shape, raw(groups)) == groups


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2], ["a"]),
        ([1], [5]),
        ([1], [None]),
        ([1], "a"),
        ([0], []),
        ([1, 3], ["a", "b", "c"]),
        ([2, 2], [["a"], ["b", "c", "d"]]),
        ([1, 1, 1], ["a"]),
        ([], ["a"]),
        ([1], ["a" * 300_000]),
        ([5000], [""] * 5000),
    ],
)
def test_wrong_texts_are_refused(shape, data):
    with pytest.raises(RequestError):
        tensors.texts_from_json(TEXTS, shape, raw(data))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x01", b"\x01\x00\x00\x00", b"\x02\x00\x00\x00a", b"\xff\xff\xff\xffab"),  # too short
        *(bytes(400), b"\x01\x00\x00\x00\xff"),  # 100 texts; no UTF-8
    ],
)
def test_wrong_binary_texts_are_refused(data):
    with pytest.raises(RequestError):
        tensors.texts_from_bytes(TEXTS, [1], data)


def test_a_model_without_a_vocabulary_takes_no_texts():
    with pytest.raises(RequestError, match="takes UINT8 only"):
        tensors.texts_from_json(InputTensor((2,), DTYPES["UINT8"]), [1], raw(["a"]))


@given(batches())
def test_an_output_is_what_the_network_computed(array):
    decoded = np.array(json.loads(tensors.to_json(array)), array.dtype).reshape(array.shape)
    np.testing.assert_array_equal(decoded, array)
    np.testing.assert_array_equal(np.frombuffer(tensors.to_bytes(array), array.dtype).reshape(array.shape), array)


def test_infinity_and_nan_become_null_in_json():
    assert json.loads(tensors.to_json(np.float32([1, np.inf, -np.inf, np.nan]))) == [1, None, None, None]
