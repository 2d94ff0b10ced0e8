"""Limits on slow and greedy clients: sizes, times and numbers."""

import contextlib
import json
import time
import tracemalloc

import fakes
import gateways
import numpy as np
import pytest
from gateways import INFER, answers, connect, is_closed, opened, request

from superserve_jax import errors
from superserve_jax.gateway import documents, requests
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.limits import Limits, check_limits
from superserve_jax.gateway.tensors import InputTensor

ROWS = np.uint8([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
GIVEN, FLOATS = {"inputs": [gateways.tensor(ROWS)]}, {"inputs": [gateways.tensor(ROWS, datatype="FP32")]}
CONTENT = gateways.body(np.uint8([[[7, 2], [3, 4]]]))
START = b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % INFER.encode()
SHORT_S = 0.2


@pytest.fixture(scope="module")
def door():
    with opened(limits={"max_head_bytes": 5000, "max_body_bytes": 20_000}) as (_, door):
        yield door


def send(sock, parts):
    """Sends parts, until the gateway closes the connection."""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            sock.sendall(part)
            time.sleep(1e-3)


# -- sizes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [START + b"X: " + b"x" * 5000 + b"\r\n\r\n"],
        [START + 100 * (b"X: " + b"x" * 50 + b"\r\n") + b"\r\n"],
        [START, *[b"X: " + b"x" * 100 + b"\r\n"] * 60],
        [START + b"X: ", *[b"x" * 100] * 60],
        [b"GET /", *[b"x" * 100] * 60],
        [b"\r\n" * 50] * 60,
        [START + b"Transfer-Encoding: chunked\r\n\r\n", b"1;", *[b"x" * 100] * 60],
        [START + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", *[b"x" * 100] * 60],
    ],
    ids=["value", "lines", "lines in packets", "value in packets", "path", "empty lines", "chunk", "trailer"],
)
def test_a_head_that_is_too_long_is_431(door, parts):
    with connect(door) as sock:
        send(sock, parts)
        [answer] = answers(sock)
        assert (answer.status, answer.headers["connection"]) == (431, "close")
        assert "more than 5,000 bytes" in answer.error
        assert is_closed(sock)


def test_a_head_within_the_limit_is_read_in_any_packets(door):
    with connect(door) as sock:
        for part in (START, b"X: " + b"x" * 4000, b"\r\n", b"Content-Length: %d\r\n" % len(CONTENT), b"\r\n", CONTENT):
            sock.sendall(part)
            time.sleep(1e-3)
        assert answers(sock)[0].status == 200


def test_the_answer_to_a_long_body_arrives_although_the_client_still_sends(door):
    for head in (b"Content-Length: 30000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n7530\r\n"):
        with connect(door) as sock:
            send(sock, [START + head, *[bytes(1000)] * 30, b"\r\n0\r\n\r\n", START + b"\r\n"])
            assert answers(sock)[0].status == 413
            start_s = time.monotonic()
            assert is_closed(sock)
            assert time.monotonic() - start_s < 2


@pytest.mark.parametrize(
    ("method", "path", "length", "status"),
    [
        ("POST", INFER, 10_000, 400),
        ("POST", f"{INFER}?a=b", 10_000, 400),
        ("POST", INFER.replace("infer", "%69nfer"), 10_000, 400),
        ("POST", "/v2/repository/index", 4096, 400),
        ("POST", "/v2/repository/index", 4097, 413),
        ("POST", "/v2/repository/index?a=/infer", 4097, 413),
        ("PUT", INFER, 4097, 413),
        ("PUT", INFER, 4096, 405),
        ("POST", "/v2/health/live?/infer", 1, 400),
        ("POST", "/v2/models/supernet/ready", 1, 400),
        ("GET", "/v2", 1, 400),
        ("HEAD", "/v2/health/live", 1, 400),
        ("GET", "/v2", None, 400),
        ("GET", "/v2", 0, 200),
    ],
)
def test_only_inferences_have_long_bodies(door, method, path, length, status):
    """A request with a body that has no use is refused before it sends the body."""
    lines = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    with connect(door) as sock:
        sock.sendall(b"%b %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n" % (method.encode(), path.encode(), lines))
        if status in (405, 200) or length in (10_000, 4096):
            sock.sendall(b"z" * length)
        head = sock.recv(1000)
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (b"takes no body; leave it out" in head) == (length in (1, None) and method != "HEAD")


# -- memory of one request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(FLOATS).replace("[1, 2, 3, 4, 5, 6, 7, 8]", "[[" + "[]," * 300_000 + "[]]]"),
        json.dumps(FLOATS).replace("[1, 2, 3, 4, 5, 6, 7, 8]", "[" + "0.1," * 300_000 + "1]"),
        json.dumps(GIVEN).replace('"inputs"', '"outputs": [' + '{"name":"a"},' * 100_000 + '{"name":"a"}], "inputs"'),
        json.dumps(GIVEN | {"parameters": {"x": [[]] * 300_000}}),
        json.dumps(GIVEN | {"outputs": [{"name": "output", "parameters": {"shared_memory_region": [[]] * 300_000}}]}),
    ],
    ids=["lists", "numbers", "outputs", "parameters", "unread"],
)
def test_a_body_does_not_take_much_more_memory_than_its_size(body):
    body = body.encode()
    tracemalloc.start()
    try:
        for dtype in (np.uint8, np.float32):
            gateways.tried(requests.read, body, None, InputTensor((2, 2), np.dtype(dtype)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * len(body)


def test_the_json_before_binary_data_is_short():
    content, length = gateways.binary_body(ROWS, id="a", parameters={"x": "y" * 70_000})
    with pytest.raises(RequestError, match="at most 65,536 are possible"):
        requests.read(content, length, InputTensor((2, 2), np.dtype(np.uint8)))


# -- times --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "content", "what"),
    [
        ("head_s", b"POST /v2", "head"),
        ("head_s", START + b"X: a\r\n", "head"),
        ("body_s", START + b"Content-Length: 100\r\n\r\n{", "body"),
        ("body_s", START + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", "body"),
    ],
)
def test_a_slow_request_is_408(limit, content, what):
    with opened(limits={limit: SHORT_S}) as (_, door), connect(door) as sock, connect(door) as second:
        sock.sendall(content)
        second.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" + content)
        [answer] = answers(sock)
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert f"the {what} took" in answer.error
        assert [each.status for each in answers(second, 2)] == [200, 408]


def test_a_slow_request_is_answered_within_the_limits():
    with opened(limits={"head_s": 5 * SHORT_S, "body_s": 10 * SHORT_S}) as (_, door), connect(door) as sock:
        for part in (START, b"Content-Length: %d\r\n\r\n" % len(CONTENT), CONTENT[:9], CONTENT[9:]):
            time.sleep(SHORT_S)
            sock.sendall(part)
        assert answers(sock)[0].status == 200


@pytest.mark.parametrize("content", [b"", b"\r\n", b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_an_idle_connection_is_closed(content):
    with opened(limits={"idle_s": SHORT_S}) as (_, door), connect(door) as sock:
        sock.sendall(content)
        if content.startswith(b"GET"):
            assert answers(sock)[0].status == 200
        assert is_closed(sock)


@pytest.mark.parametrize("content", [b"", b"\r\n"])
def test_a_new_connection_without_a_request_is_closed_early(content):
    """Such connections need no token, and there are only so many."""
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with opened(limits={"head_s": SHORT_S}) as (_, door), connect(door) as sock, connect(door) as used:
        used.sendall(live)
        assert answers(used)[0].status == 200
        sock.sendall(content)
        assert is_closed(sock)
        time.sleep(2 * SHORT_S)
        used.sendall(live)
        assert answers(used)[0].status == 200


def test_a_connection_that_waits_for_its_answer_is_not_idle():
    valve = gateways.Valve()
    row = np.uint8([[7, 2], [3, 4]])
    limits = {"idle_s": SHORT_S, "head_s": SHORT_S, "body_s": SHORT_S, "write_s": SHORT_S}
    with opened(gateways.engine(valve), limits=limits) as (server, door), connect(door) as sock:
        with valve.shut(server, row):
            sock.sendall(START + b"Content-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT)
            time.sleep(3 * SHORT_S)
        assert answers(sock)[0].status == 200


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_a_client_that_does_not_read_is_disconnected(monkeypatch, close):
    monkeypatch.setattr(documents, "server_metadata", lambda **_: "x" * 20_000_000)
    with opened(limits={"write_s": SHORT_S}) as (_, door), connect(door) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n" + close + b"\r\n")
        time.sleep(4 * SHORT_S)
        with pytest.raises((ConnectionError, gateways.http.client.IncompleteRead)):
            answers(sock)


# -- numbers ------------------------------------------------------------------------------------------------------------------


def test_connections_beyond_the_limit_get_503():
    with opened(limits={"max_connections": 2}) as (_, door):
        with connect(door) as first, connect(door) as second:
            for sock in (first, second):
                sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert answers(sock)[0].status == 200
            with connect(door) as third:
                [answer] = answers(third)
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert "too many connections" in answer.error
        fakes.wait_until(lambda: request(door, "GET", "/v2/health/live").status == 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes must be a whole number from 1 up, got 0"),
        ({"max_connections": True}, "max_connections must be a whole number"),
        ({"max_head_bytes": 1.5}, "max_head_bytes must be a whole number"),
        ({"drain_s": -1}, "drain_s must be a number of seconds from 0 up"),
        ({"lame_duck_s": float("nan")}, "lame_duck_s must be"),
        ({"head_s": 0}, "head_s must be a positive number of seconds"),
        ({"idle_s": "5"}, "idle_s must be a positive number"),
        ({"write_s": float("inf")}, "write_s must be"),
        ({"max_buffered_bytes": 1000, "max_body_bytes": 1000}, "has no room for max_body_bytes=1000; raise it"),
    ],
)
def test_wrong_limits_are_refused(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        check_limits(Limits(**options))


def test_limits_of_zero_seconds_close_at_once():
    with opened(limits={"drain_s": 0, "lame_duck_s": 0}) as (_, door), connect(door) as sock:
        sock.sendall(START)
        start_s = time.monotonic()
        door.close()
        assert time.monotonic() - start_s < 1
