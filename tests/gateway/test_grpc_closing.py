"""The port of gRPC opens, and closes without losing a call."""

import threading

import fakes
import gateways
import numpy as np
import pytest
from gateways import opened
from grpc import StatusCode
from grpcs import Client, message, refused, values
from pages import ROOT

from superserve_jax import errors, gateway

DATA = ROOT / "tests/data"
ROW = np.uint8([[[7, 2], [3, 4]]])
GRPC = {"grpc_port": 0}


def closing(door):
    thread = threading.Thread(target=door.close)
    thread.start()
    return thread


def test_closing_answers_what_has_arrived_and_refuses_what_comes():
    valve = gateways.Valve()
    with opened(gateways.engine(valve), gateway_options=GRPC) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            call, stream = client.start(message(ROW)), client.stream(iter([message(ROW)]))
            fakes.wait_until(lambda: server.health()["waiting"] == 2)
            thread = closing(door)
            fakes.wait_until(lambda: not client.call("ServerReady").ready)
            assert client.call("ServerLive").live
            assert not client.call("ModelReady", name="supernet").ready
            assert client.call("Check", "grpc.health.v1.Health").status == 2
            code, text = refused(client.infer, message(ROW))
            assert code is StatusCode.UNAVAILABLE
            assert "another replica" in text
            [late] = client.stream(iter([message(ROW)]))
            assert "another replica" in late.error_message
            assert thread.is_alive()
        assert values(call.result(fakes.WAIT_S)).tolist() == [[7, 2]]
        assert values(next(stream).infer_response).tolist() == [[7, 2]]
        thread.join(fakes.WAIT_S)
        assert refused(client.infer, message(ROW))[0] is StatusCode.UNAVAILABLE
        assert server.submit(ROW[0]).result(fakes.WAIT_S).met_slo


def test_a_call_that_takes_too_long_is_unavailable_when_the_gateway_closes():
    valve = gateways.Valve()
    with (
        opened(gateways.engine(valve), gateway_options=GRPC, limits={"drain_s": 0.05}) as (server, door),
        Client(door) as client,
    ):
        with valve.shut(server, ROW[0]):
            call = client.start(message(ROW))
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            door.close()
            assert refused(call.result, fakes.WAIT_S)[0] is StatusCode.UNAVAILABLE
        fakes.wait_until(lambda: server.snapshot()["queries"]["cancelled"] == 1)


def test_an_open_stream_does_not_keep_the_gateway_open():
    with opened(gateway_options=GRPC) as (_, door), Client(door) as client:
        stop = threading.Event()

        def requests():
            yield message(ROW)
            stop.wait(fakes.WAIT_S)

        stream, watch = client.stream(requests()), client.call("Watch", "grpc.health.v1.Health")
        next(stream), next(watch)
        door.close()
        assert refused(next, stream)[0] is StatusCode.UNAVAILABLE
        stop.set()
        assert [status.status for status in until_the_end(watch)] in ([], [2])


def until_the_end(responses):
    found = []
    code, _ = refused(lambda: [found.append(response) for response in responses])
    assert code is StatusCode.UNAVAILABLE
    return found


def test_a_gateway_goes_on_while_it_says_that_it_is_not_ready():
    with opened(gateway_options=GRPC, limits={"lame_duck_s": 0.3}) as (_, door), Client(door) as client:
        thread = closing(door)
        fakes.wait_until(lambda: not client.call("ServerReady").ready)
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]
        thread.join(fakes.WAIT_S)


def test_ports_that_cannot_be_opened_are_refused():
    with fakes.serve(gateways.engine()) as server:
        with gateway.Gateway(server, port=0, grpc_port=0) as door:
            taken = int(door.grpc_target.rsplit(":", 1)[1])
            for wrong in (taken, 70_000, -1, "grpc"):
                with pytest.raises(errors.ConfigError, match="choose another port"):
                    gateway.Gateway(server, port=0, grpc_port=wrong)
        with gateway.Gateway(server, port=0, grpc_port=taken) as again, Client(again) as client:
            assert again.grpc_target == f"127.0.0.1:{taken}"
            assert client.call("ServerReady").ready
        with gateway.Gateway(server, port=0) as door:
            assert door.grpc_target is None


def test_two_gateways_in_a_process_answer(caplog):
    with (
        opened(gateway_options=GRPC) as (_, one),
        opened(gateway_options=GRPC) as (_, other),
        Client(one) as first,
        Client(other) as second,
    ):
        calls = [client.start(message(ROW)) for _ in range(100) for client in (first, second)]
        assert all(values(call.result(fakes.WAIT_S)).tolist() == [[7, 2]] for call in calls)
    assert not caplog.records


def test_a_token_and_tls_are_for_both_ports():
    options = {"token": "a-secret-of-many-letters", "grpc_port": 0, **gateways.TLS}
    with opened(gateway_options=options) as (_, door), Client(door, gateways.TLS["tls_cert"]) as client:
        assert client.call("ServerReady").ready
        assert client.call("Check", "grpc.health.v1.Health").status == 1
        for metadata in ((), [("authorization", "Bearer wrong")], [("x", "Bearer a-secret-of-many-letters")]):
            code, text = refused(client.infer, message(ROW), metadata=metadata)
            assert code is StatusCode.UNAUTHENTICATED
            assert "Bearer TOKEN" in text
        right = [("authorization", "Bearer a-secret-of-many-letters")]
        assert values(client.infer(message(ROW), metadata=right)).tolist() == [[7, 2]]
        assert refused(client.call, "ModelConfig", name="supernet")[0] is StatusCode.UNAUTHENTICATED
