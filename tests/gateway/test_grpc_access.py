"""What the port of gRPC answers without the token, and metadata that are repeated."""

import gateways
import numpy as np
import pytest
from grpc import StatusCode
from grpcs import Client, message, refused, values

ROW = np.uint8([[[7, 2], [3, 4]]])
HEALTH = "grpc.health.v1.Health"
TOKEN = "a-secret-of-many-letters"
RIGHT = [("authorization", f"Bearer {TOKEN}")]


@pytest.fixture(scope="module")
def client():
    with gateways.opened(gateway_options={"grpc_port": 0, "token": TOKEN}) as (_, door), Client(door) as client:
        yield client


def test_probes_need_no_token(client):
    assert client.call("ServerLive").live
    assert client.call("ServerReady").ready
    assert client.call("ModelReady", name="supernet").ready
    assert client.call("Check", HEALTH, service="supernet").status == 1
    assert next(client.call("Watch", HEALTH, service="supernet")).status == 1


@pytest.mark.parametrize(
    ("name", "of", "field"), [("ModelReady", "inference.GRPCInferenceService", "name"), ("Check", HEALTH, "service")]
)
def test_probes_tell_no_names_of_models_without_the_token(client, name, of, field):
    method, request = client.method(name, of)
    asked = request(**{field: "other"})
    code, text = refused(method, asked)
    assert (code, "supernet" in text) == (StatusCode.UNAUTHENTICATED, False)
    code, text = refused(method, asked, metadata=RIGHT)
    assert (code, "supernet" in text) == (StatusCode.NOT_FOUND, True)


def test_a_watch_tells_no_names_of_models_without_the_token(client):
    method, request = client.method("Watch", HEALTH)
    assert refused(next, method(request(service="other")))[0] is StatusCode.UNAUTHENTICATED
    assert next(method(request(service="other"), metadata=RIGHT)).status == 3


def test_a_list_has_the_names_of_models_only_with_the_token(client):
    method, request = client.method("List", HEALTH)
    assert {*method(request()).statuses} == {""}
    assert "supernet" in method(request(), metadata=RIGHT).statuses


def test_a_deadline_that_is_given_twice_is_refused(client):
    for metadata in ([("x-slo-ms", "5000"), ("x-slo-ms", "20")], [("x-slo-ttft-ms", "5000")] * 2):
        code, text = refused(client.infer, message(ROW), metadata=RIGHT + metadata)
        assert code is StatusCode.INVALID_ARGUMENT
        assert "are repeated; send them once" in text
    both = [("x-slo-ms", "50000"), ("x-slo-ttft-ms", "1")]
    assert values(client.infer(message(ROW), metadata=RIGHT + both)).tolist() == [[7, 2]]
