"""Calls as grpc's core gives them, which need bytes of HTTP/2 from a socket. Private parts of grpcio take them."""

import fakes
import gateways
import grpcs
import numpy as np
from grpc import StatusCode
from grpcs import Client, message, opened, refused, values

ROW = np.uint8([[[7, 2], [3, 4]]])


def test_a_path_that_is_not_utf_8_ends_neither_the_port_nor_other_calls(caplog):
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            call, stream = client.start(message(ROW)), client.stream(iter([message(ROW)]))
            fakes.wait_until(lambda: server.health()["waiting"] == 2)
            for _ in range(20):
                with grpcs.http2(door) as sock:
                    sock.sendall(grpcs.headers(b"/a\x8c\x8c") + grpcs.data(b""))
                    assert StatusCode.UNIMPLEMENTED.value[0] == grpcs.status(sock)
                with Client(door) as other:
                    assert other.call("ServerReady").ready
        assert values(call.result(fakes.WAIT_S)).tolist() == [[7, 2]]
        assert values(next(stream).infer_response).tolist() == [[7, 2]]
    assert not caplog.records


def test_metadata_that_are_not_utf_8_do_not_fill_the_log(caplog):
    with opened() as (_, door), Client(door) as client:
        with grpcs.http2(door) as sock:
            path = b"/inference.GRPCInferenceService/ServerLive"
            sock.sendall(grpcs.headers(path, x=b"\x8c\x8c", authorization=b"\x8c") + grpcs.data(b""))
            assert grpcs.status(sock) == 0
        assert client.call("ServerReady").ready
    assert not caplog.records


def test_unknown_methods_are_unimplemented():
    with opened() as (_, door), Client(door) as client:
        for path in ("/inference.GRPCInferenceService/Other", "/a", "/", "/ü"):
            method = client.channel.unary_unary(path)
            assert refused(method, b"", timeout=fakes.WAIT_S)[0] is StatusCode.UNIMPLEMENTED


def test_calls_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("superserve_jax.gateway.grpc.port._MOST_CALLS", 3)
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            calls = [client.start(message(ROW)) for _ in range(3)]
            fakes.wait_until(lambda: server.health()["waiting"] == 3)
            with Client(door, **{"grpc.use_local_subchannel_pool": 1}) as other:
                assert refused(other.infer, message(ROW))[0] is StatusCode.RESOURCE_EXHAUSTED
        assert all(values(call.result(fakes.WAIT_S)).tolist() == [[7, 2]] for call in calls)
        assert client.call("ServerReady").ready
