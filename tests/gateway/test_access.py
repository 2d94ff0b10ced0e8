"""Who may use a gateway: the token, pages of other sites, TLS."""

import contextlib
import http.client
import socket
import ssl
import time

import fakes
import gateways
import numpy as np
import pytest
from gateways import INFER, TLS, answers, connect, infer, is_closed, opened, request

from superserve_jax import errors, gateway
from superserve_jax.gateway.access import Access, tls_context
from superserve_jax.gateway.grpc.port import Port

ROW = np.uint8([[[7, 2], [3, 4]]])
CONTENT = gateways.body(ROW)
TOKEN = "a-secret-of-many-letters"


# -- the token ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded():
    with opened(gateway_options={"token": TOKEN}) as (_, door):
        yield door


@pytest.fixture(scope="module")
def plain():
    with opened() as (_, door):
        yield door


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "\xff"]
)
def test_without_the_token_a_request_is_401(guarded, value):
    reads = ("/v2", "/metrics", "/v2/models/supernet", "/events", "/static/nothing")
    for method, path in (("POST", INFER), ("POST", "/"), *(("GET", path) for path in reads)):
        answer = request(guarded, method, path, CONTENT, Authorization=value)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="superserve"')
        assert "Authorization: Bearer TOKEN" in answer.error


def test_with_the_token_a_request_is_answered(guarded):
    for value in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
        assert infer(guarded, CONTENT, Authorization=value).status == 200


@pytest.mark.parametrize("path", ["/", "/?a=b", "/static/live.js", "/static/icon.svg", "/static/uplot-1.6.32/uPlot.min.css"])
def test_the_files_of_the_live_page_need_no_token(guarded, path):
    assert request(guarded, "GET", path).status == 200
    assert request(guarded, "GET", path, Host="evil.example").status == 403


@pytest.mark.parametrize(
    "path",
    [
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/health/ready?a=b",
        "/v2/models/supernet/ready",
        "/v2/models/supernet/versions/1/ready",
    ],
)
def test_health_probes_need_no_token(guarded, path):
    assert request(guarded, "GET", path).status == 200


def test_without_the_token_nobody_learns_the_names_of_models():
    with fakes.serve(gateways.engine()) as s, gateway.Gateway({"secret": s}, port=0, token=TOKEN) as door:
        for path in ("/v2/models/zz/ready", "/v2/models/secre/versions/1/ready", "/v2/models/%73ecret/ready"):
            answer = request(door, "GET", path)
            assert answer.status == 401
            assert "secret" not in answer.error
        assert request(door, "GET", "/v2/models/secret/ready").status == 200
        assert request(door, "GET", "/v2/models/zz/ready", Authorization=f"Bearer {TOKEN}").status == 404
        s.close()
        answer = request(door, "GET", "/v2/health/ready")
        assert answer.status == 503
        assert "secret" not in answer.error


def test_the_token_is_checked_before_the_body_is_read(guarded):
    with connect(guarded) as sock:
        sock.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" % INFER.encode())
        assert answers(sock)[0].status == 401


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SUPERSERVE_TOKEN", raising=False)
    assert gateway.read_token(None) is None
    monkeypatch.setenv("SUPERSERVE_TOKEN", "from the environment")
    assert gateway.read_token(None) == "from the environment"
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert gateway.read_token(str(tmp_path / "token")) == TOKEN
    with pytest.raises(errors.ConfigError, match="cannot read the token"):
        gateway.read_token(str(tmp_path / "nothing"))


@pytest.mark.parametrize("token", ["", "short", "with blanks in it ......", "täglich-ein-token", 5, b"x" * 20])
def test_a_weak_token_is_refused(token):
    with pytest.raises(errors.ConfigError, match="a token needs 16"):
        Access(token)


def test_a_page_of_another_site_cannot_send_requests(guarded):
    token = f"Bearer {TOKEN}"
    assert infer(guarded, CONTENT, Authorization=token, Origin="http://evil.example").status == 403
    assert infer(guarded, CONTENT, Authorization=token, Origin="null").status == 403
    assert infer(guarded, CONTENT, Authorization=token, Origin=guarded.url).status == 200
    assert request(guarded, "GET", "/v2", Authorization=token, Origin="http://evil.example").status == 200


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403), ("", 403)]
)
def test_what_browsers_say_about_the_page_counts_before_its_address(plain, site, status):
    own, proxy = plain.url, "https://gpu.example"  # behind a proxy, the address of the page is not in Host
    for origin in (own, proxy):
        assert infer(plain, CONTENT, Origin=origin, Sec_Fetch_Site=site).status == status
    assert infer(plain, CONTENT, Origin=proxy).status == 403
    assert request(plain, "GET", "/v2", Sec_Fetch_Site=site).status == 200


# -- names --------------------------------------------------------------------------------------------------------------------


def status_for(door, host, start=b"GET /v2", rest=b""):
    with connect(door) as sock:
        sock.sendall(start + b" HTTP/1.1\r\n" + (b"Host: %b\r\n" % host) + rest + b"\r\n")
        return answers(sock)[0].status


@pytest.mark.parametrize(
    "host", [b"evil.example", b"evil.example:8000", b"127.0.0.1.evil.example", b"localhost.evil", b"a b", b"["]
)
def test_a_foreign_name_for_a_local_gateway_is_403(plain, host):
    for start in (b"GET /v2", b"GET /metrics", b"GET /events", b"GET /", b"GET /v2/health/live", b"POST " + INFER.encode()):
        assert status_for(plain, host, start, b"Origin: http://%b\r\nContent-Length: 0\r\n" % host) == 403


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:80", b"127.0.0.1:9", b"127.1.2.3", b"[::1]:8000", b"0.0.0.0:80", b"192.168.1.2", b""]
)
def test_localhost_and_addresses_are_no_foreign_names(plain, host):
    assert status_for(plain, host) == 200


def test_a_request_of_http_1_0_needs_no_name(plain):
    with connect(plain) as sock:
        sock.sendall(b"GET /v2 HTTP/1.0\r\n\r\n")
        assert answers(sock)[0].status == 200


def test_with_the_token_any_name_is_right(guarded):
    assert status_for(guarded, b"gpu.example", rest=b"Authorization: Bearer %b\r\n" % TOKEN.encode()) == 200
    assert status_for(guarded, b"gpu.example", b"GET /v2/health/live") == 403


def test_a_gateway_for_other_machines_accepts_any_name():
    with fakes.serve(gateways.engine()) as s, gateway.Gateway(s, host="0.0.0.0", port=0) as door:
        assert status_for(door, b"gpu.example") == 200


# -- TLS ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def secure(door):
    """A TLS connection to a gateway."""
    context = ssl.create_default_context(cafile=TLS["tls_cert"])
    with connect(door) as sock, context.wrap_socket(sock, server_hostname="localhost") as wrapped:
        yield wrapped


def test_requests_over_tls_are_answered():
    with opened(gateway_options=TLS) as (_, door):
        assert door.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=TLS["tls_cert"])
        address = door.url.removeprefix("https://")
        connection = http.client.HTTPSConnection(address, timeout=fakes.WAIT_S, context=context)
        with contextlib.closing(connection):
            for _ in range(3):
                assert infer(door, CONTENT, connection=connection).json["outputs"][0]["data"] == [7, 2]
        with secure(door) as sock:
            sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: gpu.example\r\n\r\n")  # browsers compare it with the certificate
            assert answers(sock)[0].status == 200
        with connect(door) as plain:
            plain.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert is_closed(plain)


@pytest.mark.parametrize("kind", ["idle", "waiting", "handshake"])
def test_tls_connections_do_not_keep_a_gateway_open(kind):
    valve = gateways.Valve()
    limits = {"drain_s": 0.3, "head_s": 20}
    with contextlib.ExitStack() as stack:
        server, door = stack.enter_context(opened(gateways.engine(valve), gateway_options=TLS, limits=limits))
        with valve.shut(server, ROW[0]):
            sock = stack.enter_context(connect(door) if kind == "handshake" else secure(door))
            if kind == "idle":
                sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert answers(sock)[0].status == 200
            elif kind == "waiting":
                sock.sendall(
                    b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(CONTENT))
                    + CONTENT
                )
                fakes.wait_until(lambda: server.health()["waiting"] == 1)
            start_s = time.monotonic()
            door.close()
            assert time.monotonic() - start_s < 1.5
            if kind == "waiting":
                assert answers(sock)[0].status == 503


def test_silent_tls_connections_do_not_prolong_the_wait_for_answers(monkeypatch):
    valve, drain_s, silent, closing = gateways.Valve(), 2.0, [], Port.close
    with contextlib.ExitStack() as stack:
        options = {"gateway_options": {**TLS, "grpc_port": 0}, "limits": {"drain_s": drain_s, "head_s": 20}}
        server, door = stack.enter_context(opened(gateways.engine(valve), **options))

        async def connect_late(port):
            silent.extend(
                stack.enter_context(connect(door)) for _ in range(3)
            )  # the system accepts them, and the loop is busy
            await closing(port)

        monkeypatch.setattr(Port, "close", connect_late)
        with valve.shut(server, ROW[0]):
            sock = stack.enter_context(secure(door))
            sock.sendall(
                b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(CONTENT)) + CONTENT
            )
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            start_s = time.monotonic()
            door.close()
            assert drain_s <= time.monotonic() - start_s < 1.5 * drain_s  # two deadlines would be 2 * drain_s
            assert answers(sock)[0].status == 503
            assert len(silent) == 3


@pytest.mark.parametrize(
    "change",
    [{"tls_key": None}, {"tls_cert": None}, {"tls_cert": "nothing.pem"}, {"tls_cert": __file__}, {"tls_key": TLS["tls_cert"]}],
)
def test_wrong_files_for_tls_are_refused(change):
    with pytest.raises(errors.ConfigError, match=r"TLS needs|cannot use the certificate"):
        tls_context(*(TLS | change).values())


def test_a_port_that_is_left_by_an_error_is_free(tmp_path):
    with fakes.serve(gateways.engine()) as s, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.close()
        with pytest.raises(errors.ConfigError, match="access log"):
            gateway.Gateway(s, port=port, access_log=str(tmp_path))
        with gateway.Gateway(s, port=port) as door:
            assert infer(door, CONTENT).status == 200
