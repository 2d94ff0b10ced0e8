"""Calls over gRPC: documents, inferences, errors, deadlines, and clients that go away."""

import time

import fakes
import gateways
import grpc
import grpcs
import numpy as np
import pytest
from google.protobuf import json_format
from grpc import StatusCode
from grpcs import Client, message, opened, refused, values

from superserve_jax.gateway.grpc.service import Service
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.threads import LongWork

ROW = np.uint8([[[7, 2], [3, 4]]])


@pytest.fixture(scope="module")
def pair():
    with opened(limits={"max_body_bytes": 200_000}) as (server, door):
        yield server, door


@pytest.fixture(scope="module")
def client(pair):
    with Client(pair[1]) as client:
        yield client


# -- documents ----------------------------------------------------------------------------------------------------------------


def test_documents_are_those_of_http(pair, client):
    client.infer(message(ROW))
    for call, fields, path, key in (
        ("ServerMetadata", {}, "/v2", None),
        ("ModelMetadata", {"name": "supernet", "version": "1"}, "/v2/models/supernet", None),
        ("ModelConfig", {"name": "supernet"}, "/v2/models/supernet/config", "config"),
        ("ModelStatistics", {"name": "supernet"}, "/v2/models/supernet/stats", None),
        ("ModelStatistics", {}, "/v2/models/stats", None),
        ("RepositoryIndex", {}, "/v2/repository/index", "models"),
    ):
        found = client.call(call, **fields)
        document = gateways.request(pair[1], "POST" if call == "RepositoryIndex" else "GET", path).json
        expected = json_format.ParseDict(document if key is None else {key: document}, type(found)())
        if call == "ModelStatistics":
            assert found.model_stats[0].inference_stats.success.count > 0
            found.model_stats[0].last_inference = expected.model_stats[0].last_inference
        assert found == expected


def test_a_server_and_its_models_are_ready(client):
    assert client.call("ServerLive").live
    assert client.call("ServerReady").ready
    assert client.call("ModelReady", name="supernet").ready
    assert refused(client.call, "ModelReady", name="supernot")[1].startswith(
        "unknown model 'supernot': did you mean 'supernet'?"
    )


def test_a_closed_server_is_not_ready():
    with opened() as (server, door), Client(door) as client:
        server.close()
        assert client.call("ServerLive").live
        assert not client.call("ServerReady").ready
        assert not client.call("ModelReady", name="supernet").ready
        assert client.call("RepositoryIndex").models[0].state == "UNAVAILABLE"
        assert refused(client.infer, message(ROW))[0] is StatusCode.UNAVAILABLE


# -- inferences ---------------------------------------------------------------------------------------------------------------


def test_an_inference_has_the_model_s_output(client):
    for made in (message(ROW), message(ROW, typed="uint_contents"), message(ROW, name="supernet", slo_ms=5000)):
        made.id = "mine"
        made.model_version = "1"
        response = client.infer(made)
        assert values(response).tolist() == [[7, 2]]
        assert (response.id, response.model_name, response.model_version) == ("mine", "supernet", "1")
        parameters = response.parameters
        assert parameters["subnet"].string_param == "2"
        assert parameters["met_slo"].bool_param
        assert parameters["latency_ms"].double_param > parameters["queue_ms"].double_param > 0


def test_rows_and_outputs(client):
    made = message(np.tile(ROW, (3, 1, 1)), outputs=["subnet", "output", "met_slo", "accuracy"])
    made.outputs[1].parameters["classification"].int64_param = 1
    response = client.infer(made)
    assert values(response).tolist() == [2, 2, 2]
    assert (response.outputs[1].datatype, [*response.outputs[1].shape]) == ("BYTES", [3, 1])
    assert response.raw_output_contents[1] == 3 * b"\x07\0\0\x007:0:cat"
    assert values(response, 2).all()
    assert values(response, 3).tolist() == pytest.approx(3 * [response.parameters["accuracy"].double_param])


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_messages_may_be_compressed(client, algorithm):
    assert values(client.infer(message(ROW), compression=algorithm)).tolist() == [[7, 2]]


def test_a_message_that_is_too_long_is_refused(client):
    made = message(np.zeros((200_001,), np.uint8))
    for compression in (None, grpc.Compression.Gzip):
        assert refused(client.infer, made, compression=compression)[0] is StatusCode.RESOURCE_EXHAUSTED
    assert values(client.infer(message(ROW))).tolist() == [[7, 2]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"slo_ms": True}, (StatusCode.INVALID_ARGUMENT, "got `bool`")),
        ({"slo_ms": 0.0}, (StatusCode.INVALID_ARGUMENT, "slo_ms must be a positive")),
        ({"timeout": 1.5}, (StatusCode.INVALID_ARGUMENT, "Expected `int`")),
        ({"min_accuracy": 1.0}, (StatusCode.INVALID_ARGUMENT, "best served subnet")),
        ({"name": "other"}, (StatusCode.NOT_FOUND, "unknown model 'other'")),
        ({"outputs": ["logits"]}, (StatusCode.INVALID_ARGUMENT, "logits")),
    ],
)
def test_a_wrong_request_gets_an_error_with_a_remedy(client, options, expected):
    code, text = refused(client.infer, message(ROW, **options))
    assert code is expected[0]
    assert expected[1] in text


def test_a_full_queue_is_an_error_of_its_own():
    valve = gateways.Valve()
    with (
        opened(gateways.engine(valve), max_queue=1) as (server, door),
        Client(door) as client,
        valve.shut(server, ROW[0]),
    ):
        waiting = client.start(message(ROW))
        fakes.wait_until(lambda: server.health()["waiting"] == 1)
        assert refused(client.infer, message(ROW))[0] is StatusCode.RESOURCE_EXHAUSTED
        valve.open()
        assert values(waiting.result(fakes.WAIT_S)).tolist() == [[7, 2]]


def test_an_unexpected_error_is_logged_and_not_told(caplog):
    class BrokenModel(ServedModel):
        def submit(self, request, slo_ms):
            raise KeyError("secret")

    with fakes.serve(gateways.engine()) as server:
        handlers = Service(Repository({"supernet": BrokenModel("supernet", server)}), Limits(), LongWork()).methods()
        _, (code, text) = grpcs.call(handlers, "ModelInfer", message(ROW).SerializeToString())
    assert code is StatusCode.INTERNAL
    assert "secret" not in text
    assert "secret" in caplog.text


def test_calls_that_the_gateway_does_not_have_are_unimplemented(client):
    assert refused(client.call, "CudaSharedMemoryStatus")[0] is StatusCode.UNIMPLEMENTED


# -- deadlines ----------------------------------------------------------------------------------------------------------------


def test_the_first_deadline_that_is_given_counts():
    valve = gateways.Valve()
    with (
        opened(gateways.engine(valve), slo_ms=70_000) as (server, door),
        Client(door) as client,
    ):
        for parameters, metadata, timeout, expected_ms in (
            ({"slo_ms": 20_000, "timeout": 1}, [("x-slo-ms", "1")], 50, 20_000),
            ({"timeout": 30_000_000}, [("x-slo-ms", "1")], 50, 30_000),
            ({}, [("x-slo-ms", "40000")], 50, 40_000),
            ({}, [("x-slo-ttft-ms", "45000"), ("other", "1")], 50, 45_000),
            ({}, [], 50, 50_000),
            ({}, [], None, 70_000),
        ):
            with valve.shut(server, ROW[0]):
                call = client.start(message(ROW, **parameters), metadata=metadata, timeout=timeout)
                fakes.wait_until(lambda: server.health()["waiting"] == 1)
                [query] = server.pool.backlog.queue.items()
                found_ms = 1e3 * (query.deadline_s - query.submitted_s)
                assert abs(expected_ms - found_ms) < 5_000  # gRPC rounds its deadlines
            call.result(fakes.WAIT_S)


def test_a_call_without_time_left_is_not_submitted():
    with fakes.serve(gateways.engine()) as server:
        handlers, data = (
            Service(Repository({"supernet": ServedModel("supernet", server)}), Limits(), LongWork()).methods(),
            message(ROW).SerializeToString(),
        )
        before = server.snapshot()["queries"]["arrived"]
        for left_s in (0.0, -1.0):
            assert grpcs.call(handlers, "ModelInfer", data, left_s)[1][0] is StatusCode.DEADLINE_EXCEEDED
        assert server.snapshot()["queries"]["arrived"] == before
        for metadata in ([("x-slo-ms", "soon")], [("x-slo-ms", "\u00e9")]):
            assert grpcs.call(handlers, "ModelInfer", data, None, metadata)[1][0] is StatusCode.INVALID_ARGUMENT


def test_a_dropped_query_has_exceeded_its_deadline():
    valve = gateways.Valve()
    with (
        opened(gateways.engine(valve), expire=True) as (server, door),
        Client(door) as client,
    ):
        with valve.shut(server, ROW[0]):
            call = client.start(message(ROW, slo_ms=5.0))
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            fakes.wait_until(lambda: server.pool.backlog.queue.items()[0].deadline_s < time.monotonic())
        assert refused(call.result, fakes.WAIT_S)[0] is StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_the_query_of_a_cancelled_call_is_cancelled(end, caplog):
    valve = gateways.Valve()
    with opened(gateways.engine(valve)) as (server, door), Client(door) as client:
        with valve.shut(server, ROW[0]):
            made = message(np.tile(ROW, (2, 1, 1)), slo_ms=60_000)
            call = client.start(made, timeout=0.2 if end == "deadline" else None)
            fakes.wait_until(lambda: server.health()["waiting"] == 2)
            if end == "cancel":
                call.cancel()
            fakes.wait_until(lambda: all(query.cancelled() for query in server.pool.backlog.queue.items()))
        fakes.wait_until(lambda: server.snapshot()["queries"]["cancelled"] == 2)
        assert values(client.infer(message(ROW))).tolist() == [[7, 2]]
    assert not caplog.records
