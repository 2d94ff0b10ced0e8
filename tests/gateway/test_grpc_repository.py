"""Clients load and unload the exports of a folder over gRPC, and the health service follows."""

import fakes
import grpc
import numpy as np
import pytest
from grpcs import Client, message, refused
from repositories import Opener, opened

HEALTH = "grpc.health.v1.Health"
ROW = np.uint8([[[7, 2], [3, 4]]])
LOAD, UNLOAD = "RepositoryModelLoad", "RepositoryModelUnload"


def test_a_model_is_loaded_serves_and_is_unloaded(folder):
    with opened(folder, grpc_port=0) as door, Client(door) as client:
        assert "model_repository" in client.call("ServerMetadata").extensions
        states = {model.name: model.state for model in client.call("RepositoryIndex").models}
        assert states == dict.fromkeys(("damaged", "first", "second"), "UNAVAILABLE")
        client.call(LOAD, model_name="first")
        assert [(m.name, m.version, m.state) for m in client.call("RepositoryIndex", ready=True).models] == [
            ("first", "1", "READY")
        ]
        assert client.infer(message(ROW, name="first")).model_name == "first"
        client.call(UNLOAD, model_name="first", parameters={"unload_dependents": {"bool_param": False}})
        assert refused(client.infer, message(ROW, name="first"))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("call", "fields", "code", "text"),
    [
        (LOAD, {"model_name": "nowhere"}, "NOT_FOUND", "unknown model 'nowhere'"),
        (LOAD, {"model_name": "../elsewhere"}, "INVALID_ARGUMENT", "cannot be the name of a model"),
        (LOAD, {"model_name": "damaged"}, "INVALID_ARGUMENT", "is not the manifest"),
        (LOAD, {"model_name": "first", "repository_name": "a"}, "INVALID_ARGUMENT", "repository_name is 'a'"),
        (LOAD, {"model_name": "first", "parameters": {"config": {"string_param": "{}"}}}, "INVALID_ARGUMENT", "'config'"),
        (UNLOAD, {"model_name": "first", "parameters": {"unload_dependents": {}}}, "INVALID_ARGUMENT", "expected bool"),
        (UNLOAD, {}, "INVALID_ARGUMENT", "'' cannot be the name"),
    ],
)
def test_wrong_requests_are_refused(folder, call, fields, code, text):
    with opened(folder, grpc_port=0) as door, Client(door) as client:
        found, details = refused(client.call, call, **fields)
        assert (found.name, text in details) == (code, True), details


def test_other_machines_need_a_token(folder):
    with opened(folder, host="0.0.0.0", grpc_port=0) as door, Client(door) as client:
        code, details = refused(client.call, LOAD, model_name="first")
        assert (code, "--token-file" in details) == (grpc.StatusCode.PERMISSION_DENIED, True)


def test_the_gateway_closes_during_a_load(folder):
    opener = Opener()
    with opened(folder, opener, grpc_port=0) as door, Client(door) as client, opener.shut():
        method, request = client.method(LOAD)
        load = method.future(request(model_name="first"))
        assert opener.entered.wait(fakes.WAIT_S)
        door.close()
        assert load.code() is grpc.StatusCode.UNAVAILABLE


def test_the_health_service_follows_the_models(folder):
    def check():
        return client.call("Check", HEALTH, service="first").status

    with opened(folder, grpc_port=0) as door, Client(door) as client:
        method, request = client.method("Watch", HEALTH)
        watch = method(request(service="first"))
        names = request.DESCRIPTOR.file.message_types_by_name["HealthCheckResponse"].enum_types_by_name["ServingStatus"]
        told = (names.values_by_number[response.status].name for response in watch)
        assert next(told) == "SERVICE_UNKNOWN"
        assert refused(check)[0] is grpc.StatusCode.NOT_FOUND
        assert {*client.call("List", HEALTH).statuses} == {"", "inference.GRPCInferenceService"}
        client.call(LOAD, model_name="first")
        assert next(told) == "SERVING"
        assert check() == names.values_by_name["SERVING"].number
        assert "first" in client.call("List", HEALTH).statuses
        client.call(UNLOAD, model_name="first")
        assert next(told) == "SERVICE_UNKNOWN"
        assert refused(check)[0] is grpc.StatusCode.NOT_FOUND
        watch.cancel()
