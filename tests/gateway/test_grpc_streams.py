"""Streams of inferences over gRPC: order, errors, limits, and clients that go away. Health and reflection."""

import itertools
import threading

import fakes
import gateways
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc import StatusCode
from grpcs import Client, Request, message, opened, refused, values

from superserve_jax.gateway.grpc import service

ROW = np.uint8([[[7, 2], [3, 4]]])
HEALTH = "grpc.health.v1.Health"


def rows(count):
    """Requests with the numbers from 0 up as their first values and as their ids."""
    for i in range(count):
        made = message(np.uint8([[[i, 2], [3, 4]]]))
        made.id = str(i)
        yield made


@pytest.fixture(scope="module")
def client():
    with opened() as (_, door), Client(door) as client:
        yield client


def test_a_stream_answers_in_order(client):
    found = [response.infer_response for response in client.stream(rows(200))]
    assert [response.id for response in found] == [*map(str, range(200))]
    assert [values(response)[0, 0] for response in found] == [*range(200)]


def test_an_error_is_told_in_its_place_and_the_stream_goes_on(client):
    made = [*rows(5)]
    made[1].model_name = "other"
    made[3].ClearField("inputs")
    found = [*client.stream(iter(made))]
    assert [response.infer_response.id for response in found] == [*"01234"]
    assert [bool(response.error_message) for response in found] == [False, True, False, True, False]
    assert found[1].error_message == "unknown model 'other'; known: supernet"


def test_a_stream_has_a_limit_of_waiting_requests():
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            sent = 0

            def requests():
                nonlocal sent
                for made in itertools.islice(itertools.cycle(rows(100)), 3 * service.MOST_IN_STREAM):
                    sent += 1
                    yield made

            call = client.stream(requests())
            fakes.wait_until(lambda: server.health()["waiting"] == service.MOST_IN_STREAM)
            fakes.wait_until(lambda: sent > service.MOST_IN_STREAM)
            assert server.health()["waiting"] == service.MOST_IN_STREAM
        assert [values(response.infer_response)[0, 0] for response in call] == [i % 100 for i in range(sent)]
        assert sent == 3 * service.MOST_IN_STREAM


def test_the_queries_of_a_cancelled_stream_are_cancelled(caplog):
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            stop = threading.Event()

            def requests():
                yield from rows(3)
                stop.wait(fakes.WAIT_S)

            call = client.stream(requests())
            fakes.wait_until(lambda: server.health()["waiting"] == 3)
            call.cancel()
            stop.set()
            fakes.wait_until(lambda: all(query.cancelled() for query in server.pool.backlog.queue.items()))
        fakes.wait_until(lambda: server.snapshot()["queries"]["cancelled"] == 3)
        assert len([*client.stream(rows(3))]) == 3
    assert not caplog.records


def test_what_is_no_message_has_an_error_in_its_place(client):
    method = client.channel.stream_stream(f"/{service.NAME}/ModelStreamInfer")
    assert len([*method(iter([b"\xff", b"", Request().SerializeToString()]), timeout=fakes.WAIT_S)]) == 3


def test_a_message_that_does_not_come_is_not_waited_for():
    with opened(limits={"body_s": 0.1}) as (_, door), Client(door) as client:
        stop = threading.Event()
        method = client.channel.stream_unary(f"/{service.NAME}/ModelInfer")
        code, text = refused(method, iter(stop.wait, None), timeout=fakes.WAIT_S)
        stop.set()
        assert code is StatusCode.DEADLINE_EXCEEDED
        assert "no message came within 0.1 s" in text
        assert refused(method, iter([]), timeout=fakes.WAIT_S)[0] is StatusCode.INVALID_ARGUMENT
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]


# -- health and reflection ----------------------------------------------------------------------------------------------------


def test_health_knows_the_models(client):
    for name in ("", service.NAME, "supernet"):
        assert client.call("Check", HEALTH, service=name).status == 1
    code, text = refused(client.call, "Check", HEALTH, service="other")
    assert code is StatusCode.NOT_FOUND
    assert "'supernet'" in text
    assert {name: each.status for name, each in client.call("List", HEALTH).statuses.items()} == {
        "": 1,
        service.NAME: 1,
        "supernet": 1,
    }


def test_health_is_watched():
    with opened() as (server, door), Client(door) as client:
        found, unknown = (client.call("Watch", HEALTH, service=name) for name in ("supernet", "other"))
        assert next(found).status == 1
        assert next(unknown).status == 3
        server.close()
        assert next(found).status == 2


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_the_services(client, version):
    method, request = client.method("ServerReflectionInfo", f"grpc.reflection.{version}.ServerReflection")
    asked = [
        request(list_services=""),
        request(file_containing_symbol=service.NAME),
        request(file_by_filename="model_config.proto"),
        request(file_containing_symbol="no.such.Symbol"),
        request(all_extension_numbers_of_type="inference.ModelInferRequest"),
        request(),
    ]
    services, symbol, file, *unknown = method(iter(asked), timeout=fakes.WAIT_S)
    assert [each.name for each in services.list_services_response.service][:2] == [service.NAME, HEALTH]
    assert names_of(symbol) == ["grpc_service.proto", "model_config.proto"]
    assert names_of(file) == ["model_config.proto"]
    assert {each.error_response.error_code for each in unknown} == {5}


def names_of(response):
    files = response.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(file).name for file in files]
