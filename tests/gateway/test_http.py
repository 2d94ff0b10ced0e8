"""Requests over HTTP: their forms, connections, what is no HTTP, and clients that go away."""

import contextlib
import gzip
import http.client
import socket
import threading

import fakes
import gateways
import numpy as np
import pytest
from fakes import WAIT_S
from gateways import INFER, answers, connect, infer, is_closed, opened, request

ROW = np.uint8([[[7, 2], [3, 4]]])
CONTENT = gateways.body(ROW)
HEAD = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(CONTENT))


@pytest.fixture(scope="module")
def door():
    with opened(limits={"max_body_bytes": 200_000}) as (_, door):
        yield door


# -- requests -----------------------------------------------------------------------------------------------------------------


def test_requests_of_every_form_are_answered(door):
    binary, length = gateways.binary_body(ROW)
    chunks = iter([CONTENT[:20], CONTENT[20:]])
    for answer in (
        infer(door, CONTENT),
        infer(door, CONTENT, "/v2/models/supernet/versions/1/infer"),
        infer(door, binary, Inference_Header_Content_Length=length),
        infer(door, gzip.compress(CONTENT), Content_Encoding="gzip"),
        infer(door, chunks),
    ):
        assert answer.status == 200
        assert answer.json["outputs"][0]["data"] == [7, 2]
        assert "server" not in answer.headers
    raw = infer(door, ROW.tobytes(), Inference_Header_Content_Length=0)
    assert np.frombuffer(raw.content[int(raw.headers["inference-header-content-length"]) :], np.float32).tolist() == [7, 2]


def test_a_connection_serves_many_requests(door):
    connection = http.client.HTTPConnection(door.url.removeprefix("http://"), timeout=WAIT_S)
    with contextlib.closing(connection):
        for method, path, content, status in [
            ("POST", INFER, CONTENT, 200),
            ("GET", "/v2/health/ready", None, 200),
            ("POST", INFER, b"{}", 400),
            ("GET", "/nothing", None, 404),
            ("HEAD", "/v2", None, 200),
            ("POST", INFER, CONTENT, 200),
        ]:
            answer = request(door, method, path, content, connection)
            assert answer.status == status
            assert "connection" not in answer.headers
            if method == "HEAD":
                assert answer.content == b""


def test_pipelined_requests_are_answered_in_order(door):
    with connect(door) as sock:
        bodies = [gateways.body(np.uint8([[[value, 2], [3, 4]]])) for value in range(5)]
        sock.sendall(b"".join(HEAD.replace(b"%d" % len(CONTENT), b"%d" % len(body)) + body for body in bodies))
        assert [answer.json["outputs"][0]["data"][0] for answer in answers(sock, 5)] == [*range(5)]


def test_a_client_may_ask_before_it_sends_its_body(door):
    with connect(door) as sock:
        sock.sendall(HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(CONTENT)
        assert answers(sock)[0].status == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(door):
    with connect(door) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200001\r\n\r\n" % INFER.encode())
        assert answers(sock)[0].status == 413


def test_a_chunked_body_is_refused_at_the_limit(door):
    with connect(door) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode())
        for _ in range(3):
            sock.sendall(b"%x\r\n%b\r\n" % (100_000, bytes(100_000)))
        assert answers(sock)[0].status == 413


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_what_is_no_http_gets_400_in_json(door, content, caplog):
    with connect(door) as sock:
        sock.sendall(content)
        [answer] = answers(sock)
        assert answer.status == 400
        assert "send HTTP/1.1" in answer.error
        assert is_closed(sock)
    assert not caplog.records
    assert infer(door, CONTENT).status == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GET /v2 HTTP/1.1\r\n\r\n", "no header Host"),
        (b"GET /v2 HTTP/2.0\r\nHost: localhost\r\n\r\n", "HTTP/2.0; send HTTP/1.1"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", "does not upgrade"),
    ],
)
def test_http_that_the_gateway_does_not_speak_is_400(door, content, message):
    with connect(door) as sock:
        sock.sendall(content)
        [answer] = answers(sock)
    assert answer.status == 400
    assert message in answer.error


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        ([b"Transfer-Encoding: gzip, chunked"], 501, "Content-Encoding"),
        ([b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked"], 501, "Content-Encoding"),
        ([b"Content-Length: 1", b"Expect: 200-ok"], 417, "leave it out"),
    ],
)
def test_an_unknown_coding_or_expectation_is_refused(door, lines, status, message):
    with connect(door) as sock:
        sock.sendall(b"\r\n".join([b"POST %b HTTP/1.1" % INFER.encode(), b"Host: localhost", *lines, b"", b""]))
        [answer] = answers(sock)
    assert answer.status == status
    assert message in answer.error


def test_codings_and_expectations_have_no_case(door):
    with connect(door) as sock:
        lines = b"Transfer-Encoding: Chunked\r\nExpect: 100-Continue\r\n\r\n"
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b" % (INFER.encode(), lines))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT))
        assert answers(sock)[0].status == 200


def test_a_client_of_http_1_0_gets_no_100(door):
    with connect(door) as sock:
        sock.sendall(HEAD.replace(b"/1.1", b"/1.0").replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n") + CONTENT)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_a_path_may_be_a_whole_address_and_may_have_escapes(door):
    for target in (b"http://a:80/v2/models/supernet", b"/v2/models/super%6eet?x=y"):
        with connect(door) as sock:
            sock.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
            assert answers(sock)[0].json["name"] == "supernet"


@pytest.mark.parametrize(
    "target",
    [
        b"/v2/models/supernet/infer?",
        b"/v2/models/supernet/infer?trace=1",
        b"/v2/models/super%6eet/%69nfer",
        b"/v2/models/supernet/versions/%31/infer",
        b"http://a:80/v2/models/supernet/infer",
    ],
)
def test_an_inference_is_one_however_its_target_is_written(door, target):
    with connect(door) as sock:
        for content, status in ((CONTENT, 200), (b"zzzz", 400)):
            sock.sendall(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (target, len(content), content)
            )
            [answer] = answers(sock)
            assert answer.status == status
            assert status == 400 or answer.json["outputs"][0]["data"] == [7, 2]
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
        [answer] = answers(sock)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_http_1_0_is_answered_on_one_connection(door):
    with connect(door) as sock:
        sock.sendall(b"GET /v2 HTTP/1.0\r\n\r\n" + b"GET /v2 HTTP/1.0\r\n\r\n")
        [answer] = answers(sock)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert is_closed(sock)


@pytest.mark.parametrize("cut", [None, 30, 250])
def test_an_upgrade_is_ignored(door, cut):
    """Java's client and curl ask for HTTP/2 in this way, also with a body."""
    upgrade = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQA\r\n\r\n"
    get = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    content = HEAD.replace(b"\r\n\r\n", upgrade) + CONTENT + get.replace(b"\r\n\r\n", upgrade) + HEAD + CONTENT
    with connect(door) as sock:
        for part in (content[:cut], content[cut:] if cut else b""):
            sock.sendall(part)
        assert [answer.status for answer in answers(sock, 3)] == [200, 200, 200]


def test_a_second_request_may_also_ask_before_it_sends_its_body(door):
    with connect(door) as sock:
        sock.sendall(HEAD + CONTENT + HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        stream = sock.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        while not stream.readline().endswith(b"HTTP/1.1 100 Continue\r\n"):
            pass
        assert stream.readline() == b"\r\n"
        sock.sendall(CONTENT)
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"


def test_many_clients_get_their_own_answers(door):
    wrong = []

    def client(value):
        connection = http.client.HTTPConnection(door.url.removeprefix("http://"), timeout=WAIT_S)
        with contextlib.closing(connection):
            for _ in range(20):
                answer = infer(door, gateways.body(np.uint8([[[value, 2], [3, 4]]])), connection=connection)
                if answer.status != 200 or answer.json["outputs"][0]["data"][0] != value:
                    wrong.append(answer.content)

    threads = [threading.Thread(target=client, args=(value,)) for value in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- clients that go away -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 3])
def test_the_queries_of_a_client_that_goes_away_are_cancelled(requests, caplog):
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door):
        with valve.shut(server, ROW[0]):
            with connect(door) as sock:
                body = gateways.body(np.tile(ROW, (2, 1, 1)))
                sock.sendall(requests * (HEAD.replace(b"%d" % len(CONTENT), b"%d" % len(body)) + body))
                fakes.wait_until(lambda: server.health()["waiting"] == 2)
            fakes.wait_until(lambda: server.pool.backlog.queue.items()[0].cancelled())
        fakes.wait_until(lambda: server.snapshot()["queries"]["cancelled"] == 2)
        assert infer(door, CONTENT).status == 200
    assert not caplog.records


def test_a_client_that_resets_its_connection_has_gone(caplog):
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door):
        with valve.shut(server, ROW[0]), connect(door) as sock:
            sock.sendall(HEAD + CONTENT)
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close by a reset
        assert infer(door, CONTENT).status == 200
    assert not caplog.records


def test_a_client_that_ends_its_side_has_gone():
    """The gateway cannot tell it from a client that has closed the connection."""
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), valve.shut(server, ROW[0]), connect(door) as sock:
        sock.sendall(HEAD + CONTENT)
        fakes.wait_until(lambda: server.health()["waiting"] == 1)
        sock.shutdown(socket.SHUT_WR)
        assert is_closed(sock)
        fakes.wait_until(lambda: server.pool.backlog.queue.items()[0].cancelled())
