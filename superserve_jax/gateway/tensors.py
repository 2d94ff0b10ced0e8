"""Tensors of the protocol: from JSON or bytes to arrays, and back. Nothing is cast. No sockets.

JSON data is a list of all elements, flat or nested as the shape. Binary data is row after row in little-endian order. Each
BYTES element is its length as a 4-byte number, and then its bytes.
"""

import dataclasses
import functools
import itertools
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from superserve_jax import errors
from superserve_jax.gateway.failures import RequestError

DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"UINT{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{f"INT{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"FP{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}
"""The protocol's name of each dtype. BYTES has none, and the protocol has no name for complex numbers."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for malformed JSON."""

_TYPES = {"b": bool, "u": int, "i": int, "f": float}  # of JSON values, by the kind of the dtype
_OPENING = re.compile(rb"[\s\[]*")
# Texts of a request, and their characters.
_MOST_TEXTS, _MOST_TEXT = 4096, 1 << 18
_MOST_ESCAPED = 16  # bytes of JSON for a character, with escapes, quotes and commas
_CHARACTERS = 32  # a number in JSON is usually shorter
_SHOWN = 100  # characters of a value in an error message


@dataclasses.dataclass(frozen=True, slots=True)
class InputTensor:
    """The input of a model, as clients send it.

    Args:
      shape: the shape of one input, without a batch dimension.
      dtype: the dtype of inputs.
      any_length: whether the first dimension of an input may have any length, as for token ids.
      texts: how many texts an input may have if clients send BYTES; 0 if the model takes none, 2 for pairs.
      most: how many inputs a request may have.

    Attributes:
      datatype: the protocol's name of the dtype.

    >>> images = InputTensor((2, 2), np.dtype(np.uint8))
    >>> from_json(images, [1, 2, 2], msgspec.Raw(b"[1,2,3,4]")).tolist()
    [[[1, 2], [3, 4]]]
    >>> from_bytes(images, [1, 2, 2], bytes((1, 2, 3, 4))).tolist()
    [[[1, 2], [3, 4]]]
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    any_length: bool = False
    texts: int = 0
    most: int = 10_000

    datatype: str = dataclasses.field(init=False)

    name = "input"  # of every model's input

    def __post_init__(self):
        object.__setattr__(self, "datatype", NAMES[self.dtype])

    @property
    def dims(self) -> list[int]:
        """The shape as metadata tells it: -1 for any length."""
        return [-1, *self.shape[1:]] if self.any_length else [*self.shape]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises RequestError unless `shape` belongs to a batch of one to `most` inputs."""
        if shape and shape[0] > self.most:
            raise RequestError(f"the request has {_shown(shape[0])} inputs, but at most {self.most:,} may wait; split it")
        if shape and shape[0] >= 1 and tuple(shape[1:]) == self.shape:
            return
        if self.any_length and len(shape) == len(self.shape) + 1 and tuple(shape[2:]) == self.shape[1:] and min(shape) >= 1:
            return
        raise RequestError(
            f"input 'input' has shape {_shown([*shape])}, expected {[-1, *self.dims]}; the first dimension is the batch, from "
            "1 up" + (", and the second one the number of tokens" if self.any_length else "")
        )

    def check_text_shape(self, shape: Sequence[int]) -> None:
        """Raises RequestError unless `shape` belongs to a batch of one or more texts, or pairs of texts."""
        if not self.texts:
            raise RequestError(f"input 'input' has datatype BYTES, but this model takes {self.datatype} only; send numbers")
        counts = range(1, self.texts + 1)
        if not (len(shape) in (1, 2) and shape[0] >= 1 and (len(shape) == 1 or shape[1] in counts)):
            pairs = ", or [-1, 2] for pairs of texts" if self.texts > 1 else ""
            raise RequestError(f"texts have shape {_shown([*shape])}, expected [-1], [-1, 1]{pairs}; the first is the batch")
        if math.prod(shape) > _MOST_TEXTS or shape[0] > self.most:
            raise RequestError(f"a request has {_shown(math.prod(shape))} texts; send at most {min(_MOST_TEXTS, self.most):,}")


def from_json(tensor: InputTensor, shape: Sequence[int], data: msgspec.Raw) -> np.ndarray:
    """A batch (N, ...) from JSON. Raises RequestError for a wrong shape, a wrong type, or a number that does not fit."""
    tensor.check_shape(shape)
    values = _flat_list(_TYPES[tensor.dtype.kind], f"a list of {tensor.datatype}", shape, data)
    try:
        if tensor.dtype.char == "B":  # UINT8, the dtype of images: `bytes` is faster than `np.array`
            array = np.frombuffer(bytes(values), np.uint8)
        else:
            with np.errstate(over="ignore"):  # `_checked` refuses the infinity
                array = np.array(values, tensor.dtype)
    except (ValueError, OverflowError) as e:
        raise RequestError(
            f"the data of input 'input' has a number beyond {tensor.datatype} ({errors.one_line(e)[:100]}); send numbers that "
            "fit, since none is cast"
        ) from e
    return _checked(tensor, array.reshape(shape))


def from_bytes(tensor: InputTensor, shape: Sequence[int], data: bytes | memoryview) -> np.ndarray:
    """A batch (N, ...) from binary data, without a copy. Raises RequestError for a wrong shape or size."""
    tensor.check_shape(shape)
    nbytes = math.prod(shape) * tensor.dtype.itemsize
    if len(data) != nbytes:
        raise RequestError(
            f"input 'input' has {len(data)} bytes, expected {_shown(nbytes)} for shape {_shown([*shape])} of {tensor.datatype}"
        )
    if tensor.dtype.kind == "b" and np.frombuffer(data, np.uint8).max() > 1:
        raise RequestError("input 'input' has a BOOL byte other than 0 and 1; send one of them for each element")
    return _checked(tensor, np.frombuffer(data, tensor.dtype).reshape(shape))


def texts_from_json(tensor: InputTensor, shape: Sequence[int], data: msgspec.Raw) -> list[list[str]]:
    """One list of texts for each input, from JSON. Raises RequestError unless the data is strings of this shape."""
    tensor.check_text_shape(shape)
    return _grouped(_flat_list(str, "a list of strings", shape, data), shape)


def texts_from_bytes(tensor: InputTensor, shape: Sequence[int], data: bytes | memoryview) -> list[list[str]]:
    """One list of texts for each input, from binary data. Raises RequestError for a wrong length, or for no UTF-8."""
    tensor.check_text_shape(shape)
    texts, at, count = list[str](), 0, math.prod(shape)
    while at < len(data) and len(texts) <= count:
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or len(data) - at < 4:
            raise RequestError(f"a BYTES element at byte {at} is longer than the data; send its length, and then its bytes")
        try:
            texts.append(str(data[at + 4 : end], "utf-8"))
        except UnicodeDecodeError as e:
            raise RequestError(f"a BYTES element at byte {at} is no text in UTF-8: {e}; send texts in UTF-8") from e
        at = end
    if len(texts) != count:
        found = "more" if len(texts) > count else len(texts)
        raise RequestError(f"input 'input' has {found} texts, expected as many as shape {_shown([*shape])} holds: {count}")
    return _grouped(texts, shape)


def to_json(values: "np.ndarray | list[str]") -> bytes:
    """The flat list of all elements. JSON has no infinity and no NaN, so they become null.

    >>> to_json(np.float32([[0.5, np.inf]])), to_json(["a"])
    (b'[0.5,null]', b'["a"]')
    """
    return msgspec.json.encode(values if isinstance(values, list) else values.ravel().tolist())


def to_bytes(values: "np.ndarray | list[str]") -> bytes:
    """All elements as binary data.

    >>> to_bytes(np.uint8([[1, 2]])), to_bytes(["ab"])
    (b'\\x01\\x02', b'\\x02\\x00\\x00\\x00ab')
    """
    if not isinstance(values, list):
        return values.tobytes()
    return b"".join(struct.pack("<I", len(data)) + data for data in (text.encode() for text in values))


@functools.lru_cache(maxsize=64)
def _decoder(kind: type, depth: int) -> Any:
    """Decodes JSON lists of `kind`, nested `depth` times. msgspec is strict: it takes no true or 1.5 for a whole number."""
    nested: Any = kind
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested).decode


def _flat_list(kind: type, what: str, shape: Sequence[int], data: msgspec.Raw) -> list[Any]:
    """All elements of JSON data, flat or nested as `shape`. Raises RequestError for a wrong count or a wrong type."""
    opening: Any = _OPENING.match(memoryview(data))
    depth = opening[0].count(b"[")
    if depth not in (1, len(shape)):
        raise RequestError(
            f"the data of input 'input' has {depth} opening brackets; send a flat list, or a list that is nested {len(shape)} "
            "times as its shape"
        )
    count = math.prod(shape)
    if kind is str and len(data) > _MOST_ESCAPED * _MOST_TEXT:
        raise RequestError(f"the texts have {len(data):,} bytes of JSON, at most {_MOST_TEXT:,} characters are possible")
    if kind is not str and len(data) > _CHARACTERS * count and bytes(data).count(b",") + 1 != count:
        # Decoded, this might take fifty times the memory. Flat and nested lists have as many commas.
        raise RequestError(f"input 'input' has {len(data):,} bytes of JSON, and not as many elements as its shape; send these")
    try:
        values = _decoder(kind, depth)(data)
    except MALFORMED as e:
        raise RequestError(
            f"the data of input 'input' is not {what}: {errors.one_line(e)[:300]}; values are not converted"
        ) from e
    for size in shape[1:depth]:
        if {size} != set(map(len, values)):
            raise RequestError(f"the data of input 'input' is not nested as its shape {_shown([*shape])}; make them agree")
        values = [*itertools.chain.from_iterable(values)]
    if len(values) != count:
        raise RequestError(f"input 'input' has {len(values)} elements, expected as many as shape {_shown([*shape])} holds")
    return values


def _checked(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    """Raises RequestError for NaN and infinity. The server would fail the whole batch, with other clients' queries."""
    if tensor.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestError(f"input 'input' has NaN, infinity, or a number beyond {tensor.datatype}; send finite numbers")
    return array


def _grouped(texts: list[str], shape: Sequence[int]) -> list[list[str]]:
    if (size := sum(map(len, texts))) > _MOST_TEXT:
        raise RequestError(f"the texts have {size:,} characters, at most {_MOST_TEXT:,} in a request; send fewer of them")
    each = len(texts) // shape[0]
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def _shown(value: object) -> str:
    """A value that may be a number with thousands of digits, or a very long list of numbers."""
    try:
        text = str(value)
    except ValueError:  # Python refuses to print a number of more than 4,300 digits
        return "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
