"""Calls as grpc's core gives them, which need bytes of HTTP/2 from a socket. Private parts of grpcio take them."""

import fakes
import gateways
import grpcs
import numpy as np
from grpc import StatusCode
from grpcs import Client, message, opened, refused, values

from superserve_jax.gateway.grpc import calls

HEALTH = "grpc.health.v1.Health"
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
    monkeypatch.setitem(calls.MOST_OPEN, "inference", 3)
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            started = [client.start(message(ROW)) for _ in range(3)]
            fakes.wait_until(lambda: server.health()["waiting"] == 3)
            with Client(door, **{"grpc.use_local_subchannel_pool": 1}) as other:
                assert refused(other.infer, message(ROW))[0] is StatusCode.RESOURCE_EXHAUSTED
                assert other.call("ServerReady").ready
        assert all(values(call.result(fakes.WAIT_S)).tolist() == [[7, 2]] for call in started)


def test_calls_that_stand_open_do_not_take_the_places_of_others(monkeypatch):
    for kind in calls.MOST_OPEN:
        monkeypatch.setitem(calls.MOST_OPEN, kind, 2)
    with opened() as (_, door), Client(door) as client:
        watches = [client.call("Watch", HEALTH, service="supernet") for _ in range(2)]
        assert [next(watch).status for watch in watches] == [1, 1]
        assert refused(next, client.call("Watch", HEALTH))[0] is StatusCode.RESOURCE_EXHAUSTED
        reflect, _ = client.method("ServerReflectionInfo", "grpc.reflection.v1.ServerReflection")
        assert refused(next, reflect(iter([]), timeout=fakes.WAIT_S))[0] is StatusCode.RESOURCE_EXHAUSTED
        code, text = refused(client.call, "RepositoryModelLoad", model_name="supernet")
        assert (code, "--models DIR" in text) == (StatusCode.INVALID_ARGUMENT, True)
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]
        assert client.call("Check", HEALTH).status == 1


def test_short_calls_without_a_message_do_not_take_the_places_of_inferences(monkeypatch):
    for kind in calls.MOST_OPEN:
        monkeypatch.setitem(calls.MOST_OPEN, kind, 2)
    with opened() as (_, door), Client(door) as client, grpcs.http2(door) as sock:
        for stream in (1, 3):
            sock.sendall(grpcs.headers(b"/inference.GRPCInferenceService/ServerLive", stream))

        def is_full():
            try:
                return not client.call("ServerLive").live
            except grpcs.grpc.RpcError as error:
                return error.code() is StatusCode.RESOURCE_EXHAUSTED

        fakes.wait_until(is_full)
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]
