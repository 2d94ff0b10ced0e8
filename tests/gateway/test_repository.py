"""Clients load and unload the exports of a folder, over HTTP."""

import errno
import gc
import json
import pathlib
import urllib.request
import weakref

import fakes
import gateways
import numpy as np
import pytest
from gateways import infer, request
from repositories import Opener, change, opened, states

from superserve_jax import errors, gateway

ROW = np.uint8([[[7, 2], [3, 4]]])
CONTENT = gateways.body(ROW)
FIRST = "/v2/models/first/infer"
TOKEN = "a-secret-of-many-letters"


def test_a_model_is_loaded_serves_and_is_unloaded(folder):
    opener = Opener()
    with opened(folder, opener) as door:
        assert states(door) == {"first": "UNAVAILABLE", "second": "UNAVAILABLE"}
        assert request(door, "GET", "/v2/health/ready").status == 200
        assert infer(door, CONTENT, FIRST).status == 404
        answer = change(door, "first")
        assert (answer.status, answer.json) == (200, {})
        assert states(door) == {"first": "READY", "second": "UNAVAILABLE"}
        assert states(door, b'{"ready": true}') == {"first": "READY"}
        assert [*door.models] == ["first"]
        assert infer(door, CONTENT, FIRST).json["outputs"][0]["data"] == [7, 2]
        assert request(door, "GET", "/v2/models/first/ready").status == 200
        assert b'model="first"' in request(door, "GET", "/metrics").content
        answer = change(door, "first", "unload")
        assert (answer.status, answer.json) == (200, {})
        assert states(door) == {"first": "UNAVAILABLE", "second": "UNAVAILABLE"}
        assert infer(door, CONTENT, FIRST).status == 404
        assert request(door, "GET", "/v2/models/first/ready").status == 404
        assert b'model="first"' not in request(door, "GET", "/metrics").content
        assert opener.opened[0].health()["closed"]
        assert change(door, "first").status == 200
        assert infer(door, CONTENT, FIRST).status == 200
    assert [server.health()["closed"] for server in opener.opened] == [True, True]


def test_a_load_warns_about_a_device_that_models_share(folder, caplog):
    with opened(folder) as door:
        assert change(door, "first").status == 200
        assert "as if it were alone" not in caplog.text
        assert change(door, "second").status == 200
        assert "first, second share fake:0, and each is scheduled as if it were alone" in caplog.text


def test_a_model_from_the_start_may_be_unloaded_and_is_not_replaced_by_another_export(folder):
    with opened(folder, servers=["first", "other"]) as door:
        answer = change(door, "first")
        assert (answer.status, "served from elsewhere" in answer.error) == (400, True)
        assert change(door, "first", "unload").status == 200
        assert change(door, "first").status == 200
        assert change(door, "other", "unload").status == 200
        answer = change(door, "other")
        assert (answer.status, answer.error) == (404, "unknown model 'other'; known: damaged, first, second")
        assert [*door.models] == ["first"]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("nowhere", 404, "unknown model 'nowhere'; known: damaged, first, second"),
        ("fist", 404, "did you mean 'first'?"),
        ("link", 404, "unknown model 'link'"),
        ("loop", 404, "unknown model 'loop'"),
        ("file", 404, "unknown model 'file'"),
        ("..", 400, "'..' cannot be the name of a model"),
        ("%2e%2e", 400, "'..' cannot be"),
        (".", 400, "'.' cannot be"),
        ("stats", 400, "'stats' cannot be"),
        ("a%00b", 400, "cannot be"),
        ("..%2felsewhere", 404, "no path"),
        ("empty", 400, "is not an export"),
        ("damaged", 400, "is not the manifest of a superserve_jax export"),
    ],
)
@pytest.mark.parametrize("what", ["load", "unload"])
def test_only_exports_right_below_the_folder_may_be_loaded(folder, name, status, message, what):
    with opened(folder) as door:
        answer = change(door, name, what)
        assert (answer.status, message in answer.error) == (status, True), answer.error
        assert not door.models


def test_a_folder_that_may_not_be_read_hides_no_other_one(folder, monkeypatch):
    real = pathlib.Path.is_file

    def is_file(path):
        if path.parent.name == "empty":
            raise PermissionError(errno.EACCES, "permission denied")
        return real(path)

    monkeypatch.setattr(pathlib.Path, "is_file", is_file)
    with opened(folder) as door:
        assert states(door) == {"first": "UNAVAILABLE", "second": "UNAVAILABLE"}
        assert change(door, "nowhere").status == 404
        assert "permission denied" in change(door, "empty").error


@pytest.mark.parametrize(
    ("what", "body", "message"),
    [
        ("load", {"parameters": {"config": "{}"}}, "unknown parameter 'config'"),
        ("load", {"parameters": {"file:1/model": "AA=="}}, "unknown parameter 'file:1/model'"),
        ("load", {"parameters": {"unload_dependents": True}}, "unknown parameter 'unload_dependents'"),
        ("unload", {"parameters": {"unload_dependents": 1}}, "unload_dependents is '1', expected bool"),
        ("load", {"parameters": 5}, 'send {"parameters": {}}, or nothing'),
        ("unload", [], "the body is not a request for unloading a model"),
    ],
)
def test_wrong_parameters_are_refused(folder, what, body, message):
    with opened(folder) as door:
        answer = change(door, "first", what, json.dumps(body).encode())
        assert (answer.status, message in answer.error) == (400, True), answer.error


@pytest.mark.parametrize("value", [False, True])
def test_no_model_depends_on_another_one(folder, value):
    with opened(folder) as door:
        change(door, "first")
        body = json.dumps({"parameters": {"unload_dependents": value}}).encode()
        assert change(door, "first", "unload", body).status == 200
        assert change(door, "first", "unload", body).status == 200  # it is unloaded already


def test_without_a_folder_nothing_may_be_loaded():
    with gateways.opened() as (_, door):
        for what in ("load", "unload"):
            answer = change(door, "supernet", what)
            assert (answer.status, "--models DIR" in answer.error) == (400, True)
        assert "model_repository" not in request(door, "GET", "/v2").json["extensions"]


def test_other_machines_need_a_token(folder):
    with opened(folder, host="0.0.0.0") as door:
        for what in ("load", "unload"):
            answer = change(door, "first", what)
            assert (answer.status, "--token-file" in answer.error) == (403, True)
        assert states(door) == {"first": "UNAVAILABLE", "second": "UNAVAILABLE"}
        assert "model_repository" not in request(door, "GET", "/v2").json["extensions"]
    with opened(folder, host="0.0.0.0", token=TOKEN) as door:
        assert change(door, "first").status == 401
        assert change(door, "first", authorization=f"Bearer {TOKEN}").status == 200
        found = request(door, "GET", "/v2", authorization=f"Bearer {TOKEN}").json["extensions"]
        assert [name for name in found if name.startswith("model_repository")] == ["model_repository"]


def test_a_page_of_another_site_may_load_nothing(folder):
    with opened(folder) as door:
        assert change(door, "first", origin="http://evil.example").status == 403
        assert request(door, "GET", "/v2/repository/models/first/load").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("error", "status", "message", "reason"),
    [
        (
            errors.ConfigError("the policy is wrong"),
            400,
            "model 'first' cannot be loaded: the policy is wrong",
            "the policy is",
        ),
        (errors.UnknownNameError("unknown policy 'a'"), 400, "unknown policy 'a'", "unknown policy 'a'"),
        (errors.ExportError("weights/0 is damaged"), 400, "weights/0 is damaged", "weights/0 is damaged"),
        (RuntimeError("secret"), 500, "the gateway failed; its log has the reason", "(RuntimeError)"),
    ],
)
def test_the_error_of_a_load_is_the_answer_and_the_reason_in_the_index(folder, caplog, error, status, message, reason):
    opener = Opener()
    opener.error = error
    with opened(folder, opener) as door:
        answer = change(door, "first")
        assert (answer.status, message in answer.error) == (status, True), answer.error
        _, first, second = request(door, "POST", "/v2/repository/index").json
        assert reason in first["reason"]
        assert (first["state"], second["reason"]) == ("UNAVAILABLE", "it is not loaded")
        opener.error = None
        assert change(door, "first").status == 200


def test_a_server_that_does_not_fit_the_protocol_is_closed(folder):
    servers = []

    def open_model(_):
        servers.append(fakes.serve(gateways.engine(input_dtype=np.complex64)))
        return servers[0]

    with opened(folder, open_model) as door:
        answer = change(door, "first")
        assert (answer.status, "complex64" in answer.error) == (400, True)
    assert servers[0].health()["closed"]


def test_a_load_replaces_a_server_that_is_closed(folder):
    opener = Opener()
    with opened(folder, opener) as door:
        change(door, "first")
        assert change(door, "first").status == 200
        assert len(opener.opened) == 1
        opener.opened[0].close()
        assert states(door)["first"] == "UNAVAILABLE"
        assert change(door, "first").status == 200
        assert infer(door, CONTENT, FIRST).status == 200


def test_nothing_keeps_a_server_that_is_unloaded(folder):
    opener, servers = Opener(), []

    def open_model(path):
        server = opener(path)
        opener.opened.clear()
        servers.append(weakref.ref(server))
        return server

    def is_gone():
        gc.collect()
        return servers[0]() is None

    with opened(folder, open_model) as door:
        change(door, "first")
        assert infer(door, CONTENT, FIRST).status == 200
        assert not is_gone()
        change(door, "first", "unload")
        fakes.wait_until(is_gone)


def test_the_body_limit_is_for_every_model_that_may_come(folder):
    with opened(folder) as door:
        change(door, "first")
        assert infer(door, bytes(2 << 20), FIRST).status == 413  # the limit of the model
        assert door.models.max_body_bytes == 64 << 20
    with opened(folder, limits=gateway.Limits(max_body_bytes=1000)) as door:
        assert door.models.max_body_bytes == 1000


def test_the_live_page_and_its_demo_follow_the_models(folder):
    with opened(folder, demo=True) as door, urllib.request.urlopen(f"{door.url}/events", timeout=fakes.WAIT_S) as events:

        def names():
            event = b""
            while not event.startswith(b"data: "):
                event = events.readline()
            return [*json.loads(event.removeprefix(b"data: "))["now"]["demo"]]

        def burst():
            content = json.dumps({"model": "first", "burst_qps": 1}).encode()
            return request(door, "POST", "/demo", content, origin=door.url).status

        assert (names(), burst()) == ([], 404)
        change(door, "first")
        fakes.wait_until(lambda: names() == ["first"])
        assert burst() == 200
        change(door, "first", "unload")
        fakes.wait_until(lambda: names() == [])
        assert burst() == 404


def test_a_gateway_needs_a_server_or_a_folder(folder):
    with pytest.raises(errors.ConfigError, match="give a dict of one or more servers"):
        gateway.Gateway({}, port=0)
    with pytest.raises(errors.ConfigError, match="there is no folder"):
        gateway.Gateway({}, port=0, models_dir=str(folder / "file"))


def test_a_server_that_may_be_unloaded_has_only_one_name(folder):
    with fakes.serve(gateways.engine()) as server:
        with pytest.raises(errors.ConfigError, match="'one' and 'other' are one server"):
            gateway.Gateway({"one": server, "other": server}, port=0, models_dir=str(folder))
        with gateway.Gateway({"one": server, "other": server}, port=0) as door:
            assert {*door.models} == {"one", "other"}
