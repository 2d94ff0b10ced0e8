"""Bodies: inflated up to a limit, and compressed."""

import gzip
import zlib

import gateways
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.gateway import bodies
from superserve_jax.gateway.messages import JSON, Answer

PACK = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}


def read(body, most=1000, coding=None):
    headers = {} if coding is None else {b"content-encoding": coding.encode()}
    return gateways.tried(bodies.read, gateways.message("POST", "/", body, headers), most)


@given(st.binary(max_size=40), st.sampled_from([None, *PACK]), st.integers(1, 30))
def test_a_body_arrives_whole_unless_it_is_too_long(whole, coding, most):
    body = whole if coding is None else PACK[coding](whole)
    found, error = read(body, most, coding)
    if error is not None:
        assert error.status == 413
    assert (found == whole) == (max(len(whole), len(body)) <= most)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_small_body_does_not_become_a_huge_one(coding):
    _, error = read(PACK[coding](bytes(50_000_000)), 100_000, coding)
    assert error.status == 413


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("br", b"", 415),
        ("gzip, gzip", b"", 415),
        ("x" * 900, b"", 415),
        ("gzip", b"not gzip", 400),
        ("gzip", zlib.compress(b"a"), 400),
        ("deflate", gzip.compress(b"a", mtime=0), 400),
        ("gzip", gzip.compress(b"abc", mtime=0)[:-1], 400),
        ("gzip", gzip.compress(b"abc", mtime=0) + b"x", 400),
        ("deflate", zlib.compress(b"a") * 2, 400),
        ("gzip", b"", 400),
    ],
)
def test_a_wrong_coding_or_a_damaged_body_is_refused(coding, body, status):
    _, error = read(body, coding=coding)
    assert error.status == status
    assert (error.headers == ((b"accept-encoding", b"gzip, deflate"),)) == (status == 415)
    assert len(str(error)) < 300


def test_the_members_of_a_gzip_file_are_one_body_with_one_limit():
    assert read(gzip.compress(b"ab") + gzip.compress(b"c"), coding="gzip") == (b"abc", None)
    _, error = read(gzip.compress(bytes(6)) * 2, 11, coding="gzip")
    assert error.status == 413


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=200))
def test_members_may_end_anywhere(members):
    assert read(b"".join(map(gzip.compress, members)), 100_000, coding="gzip") == (b"".join(members), None)


def test_a_body_of_very_many_members_is_refused():
    """A member of 20 bytes takes a microsecond, and 64 MiB have three million of them."""
    whole, error = read(gzip.compress(b"") * 1000, 100_000, coding="gzip")
    assert (whole, error) == (b"", None)
    _, error = read(gzip.compress(b"") * 1001, 100_000, coding="gzip")
    assert error.status == 400
    assert "more than 1,000 members" in str(error)


def test_identity_is_no_coding():
    assert read(b"abc", coding="Identity") == (b"abc", None)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (b"", None),
        (b"gzip", b"gzip"),
        (b"deflate, gzip", b"gzip"),
        (b"br;q=1.0, DEFLATE;q=0.5, *;q=0.1", b"deflate"),
        (b"gzip; q=0, deflate;q=0.0", None),
        (b"gzip;\tq=0", None),
        (b"identity", None),
    ],
)
def test_an_answer_is_compressed_as_the_client_accepts(accepted, coding):
    content = bytes(20_000)
    found = bodies.compressed(Answer(content), accepted)
    named = dict(found.headers)
    assert named.get(b"content-encoding") == coding
    assert named[b"vary"] == b"accept-encoding"
    assert (found.body if coding is None else bodies.inflate(found.body, coding, 20_000)) == content


@pytest.mark.parametrize(
    "answer",
    [
        Answer(bytes(10_000), 200, (JSON,)),
        Answer(bytes(100_000), 200, ((b"content-type", b"application/octet-stream"),)),
    ],
)
def test_short_answers_and_tensors_are_not_compressed(answer):
    assert bodies.compressed(answer, b"gzip") is answer
