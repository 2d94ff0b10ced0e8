"""The number of a message's fields has a limit."""

import grpcs
import numpy as np
import pytest

from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import wire
from superserve_jax.gateway.grpc.wire import MOST_FIELDS

MB = 1_000_000


def field(number, content):
    """A field with bytes in it."""
    length = b""
    size = len(content)
    while size > 127:
        length += bytes((size & 127 | 128,))
        size >>= 7
    return bytes((number << 3 | 2,)) + length + bytes((size,)) + content


@pytest.mark.parametrize(
    "made",
    [
        b"\x2a\x00" * MB,  # inputs
        b"\x22\x00" * MB,  # parameters
        b"\x3a\x01a" * MB,  # raw_input_contents
        field(5, b"\x18\x01" * MB),  # dimensions
        field(5, b"\x22\x00" * MB),  # parameters of an input
        field(5, field(5, b"\x42\x00" * MB)),  # texts
        field(5, field(5, b"")) + field(5, field(5, b"\x45abcd" * MB)),
        b"\x41abcdefgh" * MB,
    ],
    ids=lambda made: made[:12].hex(),
)
def test_messages_with_very_many_fields_are_refused(made):
    with pytest.raises(RequestError, match="20,000 fields"):
        wire.check_fields(made)


def test_other_messages_pass():
    for made in (
        grpcs.message(np.zeros((MB,), np.uint8)),
        grpcs.message(np.zeros((MB,), np.uint8), typed="uint_contents"),
        grpcs.message(np.full((3, MB), 255, np.int64), typed="int64_contents"),
        grpcs.message(np.zeros((MB,), np.float32), typed="fp32_contents", slo_ms=3, outputs=["output"] * 100),
    ):
        wire.check_fields(made.SerializeToString())
    texts = [b"\x42\x40" + 64 * b"a"] * (MOST_FIELDS - 2)
    wire.check_fields(field(5, field(5, b"".join(texts))))
    with pytest.raises(RequestError):
        wire.check_fields(field(5, field(5, b"".join([*texts, texts[0]]))))


def test_malformed_messages_are_left_to_the_parser():
    random = np.random.default_rng(0)
    for _ in range(50):
        wire.check_fields(random.bytes(300_000))
    for made in (b"\xff" * MB, b"\x2a" + b"\xff" * MB, b"\x2b" * MB, field(5, b"\x2a\xff\xff\xff\xff\x7f" + b"a" * MB)):
        wire.check_fields(made)
