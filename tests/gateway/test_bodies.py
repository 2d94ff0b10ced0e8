"""Bodies: read up to a limit, inflated and compressed."""

import asyncio
import gzip
import zlib

import gateways
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.gateway import bodies

PACK = {"gzip": gzip.compress, "deflate": zlib.compress}


def read(*chunks, most=1000, **headers):
    """Reads a body that comes in chunks. The client goes away at a chunk that is None."""
    left = list(chunks)

    async def receive():
        chunk = left.pop(0)
        return (
            {"type": "http.disconnect"} if chunk is None else {"body": chunk, "more_body": bool(left), "type": "http.request"}
        )

    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return gateways.tried(lambda: asyncio.run(bodies.read(receive, named, most))), len(left)


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=5), st.sampled_from([None, "gzip", "deflate"]), st.integers(1, 30))
def test_a_body_arrives_whole_unless_it_is_too_long(chunks, coding, most):
    whole = b"".join(chunks)
    if coding is not None:
        packed = PACK[coding](whole)
        chunks = [packed[:5], packed[5:12], packed[12:]]
    (found, error), _ = read(*chunks, most=most, **({} if coding is None else {"content_encoding": coding}))
    if error is not None:
        assert error.status == 413
    assert (found == whole) == (max(len(whole), sum(map(len, chunks))) <= most)


def test_a_body_is_refused_by_its_length_before_it_is_read():
    (_, error), left = read(b"x", most=1000, content_length="1001")
    assert (error.status, left) == (413, 1)


def test_reading_stops_at_the_limit():
    (_, error), left = read(*[bytes(400)] * 10, most=1000)
    assert (error.status, left) == (413, 7)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_small_body_does_not_become_a_huge_one(coding):
    bomb = PACK[coding](bytes(50_000_000))
    (_, error), _ = read(bomb, most=100_000, content_encoding=coding)
    assert error.status == 413


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("br", b"", 415),
        ("gzip, gzip", b"", 415),
        ("x" * 10_000, b"", 415),
        ("gzip", b"not gzip", 400),
        ("gzip", zlib.compress(b"a"), 400),
        ("deflate", gzip.compress(b"a"), 400),
        ("gzip", gzip.compress(b"abc")[:-1], 400),
        ("gzip", gzip.compress(b"a") * 2, 400),
        ("gzip", b"", 400),
    ],
)
def test_a_wrong_coding_or_a_damaged_body_is_refused(coding, body, status):
    (_, error), _ = read(body, content_encoding=coding)
    assert error.status == status
    assert len(str(error)) < 300


def test_identity_is_no_coding():
    assert read(b"abc", content_encoding="Identity")[0] == (b"abc", None)


@pytest.mark.parametrize("chunks", [[None], [b"a", None]])
def test_a_client_that_goes_away_is_noticed(chunks):
    with pytest.raises(bodies.DisconnectedError):
        read(*chunks)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (None, None),
        (b"", None),
        (b"gzip", b"gzip"),
        (b"deflate, gzip", b"gzip"),
        (b"br;q=1.0, DEFLATE;q=0.5, *;q=0.1", b"deflate"),
        (b"gzip; q=0, deflate;q=0.0", None),
        (b"identity", None),
    ],
)
def test_an_answer_is_compressed_as_the_client_accepts(accepted, coding):
    content = bytes(10_000)
    found, named = bodies.compressed(content, accepted)
    assert named == coding
    assert (found if coding is None else bodies.inflate(found, coding, 10_000)) == content


def test_a_short_answer_is_not_compressed():
    assert bodies.compressed(bytes(1000), b"gzip") == (bytes(1000), None)
