"""What the gateway tells about itself and its models: metadata, readiness, statistics, metrics. And its paths."""

import time

import fakes
import gateways
import numpy as np
import prometheus_client.parser
import pytest
from gateways import INFER, call

from superserve_jax.gateway.app import App
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.threads import LongWork

ROW = np.uint8([[[7, 2], [3, 4]]])
MODEL = "/v2/models/supernet"


def infer(app, content, path=INFER):
    return call(app, "POST", path, content)


# -- documents ----------------------------------------------------------------------------------------------------------------


def test_the_gateway_tells_its_extensions(app):
    found = call(app, "GET", "/v2").json
    assert found["name"] == "superserve-jax"
    assert found["extensions"] == [
        *("binary_tensor_data", "classification", "model_configuration", "parameters", "statistics"),
    ]


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_a_model_tells_its_input_and_output(app, version):
    assert call(app, "GET", MODEL + version).json == {
        "name": "supernet",
        "versions": ["1"],
        "platform": "superserve_jax",
        "inputs": [{"name": "input", "datatype": "UINT8", "shape": [-1, 2, 2]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
    }
    config = call(app, "GET", f"{MODEL}{version}/config").json
    assert config["max_batch_size"] == 4
    assert config["input"] == [{"name": "input", "data_type": "TYPE_UINT8", "dims": [2, 2]}]
    assert config["output"] == [{"name": "output", "data_type": "TYPE_FP32", "dims": [2]}]
    assert config["parameters"]["slo_ms"] == {"string_value": "60000"}
    assert config["parameters"]["accuracies"] == {"string_value": "0.7,0.75,0.8"}


def test_a_model_of_token_ids_tells_that_their_number_varies():
    profile = fakes.BUCKETED
    engine = gateways.engine(profile=profile, input_shape=(64,), input_dtype=np.int32)
    with fakes.serve(engine, profile=profile, policy="fixed:0") as s:
        app = gateways.app(s)
        assert call(app, "GET", MODEL).json["inputs"] == [{"name": "input", "datatype": "INT32", "shape": [-1, -1]}]
        reply = infer(app, gateways.body(np.int32([[5, 6, 7]] * 2)))
        assert reply.json["outputs"][0]["data"] == [5, 0] * 2
        error = infer(app, gateways.body(np.ones((1, 65), np.int32))).error
        assert "expected 1 to 64" in error


def test_the_server_and_its_models_are_live_and_ready(app):
    assert call(app, "GET", "/v2/health/live").json == {"live": True}
    assert call(app, "GET", "/v2/health/ready").json == {"ready": True}
    for path in (f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
        assert call(app, "GET", path).json == {"name": "supernet", "ready": True}
    assert call(app, "POST", "/v2/repository/index").json == [
        {"name": "supernet", "version": "1", "state": "READY", "reason": ""}
    ]


def test_a_closed_server_is_live_but_not_ready():
    with fakes.serve(gateways.engine()) as s:
        app = gateways.app(s)
    assert call(app, "GET", "/v2/health/live").status == 200
    for path in ("/v2/health/ready", f"{MODEL}/ready"):
        answer = call(app, "GET", path)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "no open server with a worker" in answer.error
    [entry] = call(app, "POST", "/v2/repository/index", b"{}").json
    assert (entry["state"], bool(entry["reason"])) == ("UNAVAILABLE", True)
    assert call(app, "POST", "/v2/repository/index", b'{"ready": true}').json == []
    answer = infer(app, gateways.body(ROW))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "the model's server is closed" in answer.error


def test_statistics_count_what_the_server_did():
    now_s = [0.0]

    def run(subnet, batch_size, inputs):
        now_s[0] += 0.5 * len(inputs)

    with fakes.serve(gateways.engine(run), clock=lambda: now_s[0]) as s:
        app = gateways.app(s)  # its first query learns the shape of an output
        assert infer(app, gateways.body(np.concatenate([ROW] * 3))).status == 200
        fakes.idle_worker(s)
        [found] = call(app, "GET", f"{MODEL}/stats").json["model_stats"]
        time.sleep(0.002)
        assert call(app, "GET", "/v2/models/stats").json["model_stats"] == [found]
    assert (found["inference_count"], found["execution_count"]) == (4, 2)
    assert found["inference_stats"]["success"] == {"count": 4, "ns": 5_000_000_000}
    assert found["inference_stats"]["queue"] == {"count": 4, "ns": 0}
    assert [(b["batch_size"], b["compute_infer"]) for b in found["batch_stats"]] == [
        (1, {"count": 1, "ns": 500_000_000}),
        (3, {"count": 1, "ns": 1_500_000_000}),
    ]
    assert found["last_inference"] > 1_500_000_000_000


@pytest.mark.parametrize("version", [None, "1.0.0", "0.0.1", "a", "9", ""])
@pytest.mark.parametrize("kind", [None, "text/plain", "application/openmetrics-text"])
def test_metrics_have_the_name_of_the_model(app, kind, version):
    accept = kind or "*/*"
    accept = accept if version is None else f"{accept}; version={version}"
    answer = call(app, "GET", "/metrics", headers=[(b"accept", accept.encode())])
    assert answer.status == 200
    assert ("openmetrics" in answer.headers["content-type"]) == (kind == "application/openmetrics-text")
    families = prometheus_client.parser.text_string_to_metric_families(answer.content.decode())
    samples = [sample for family in families for sample in family.samples]
    assert samples
    assert {sample.labels["model"] for sample in samples} == {"supernet"}


def test_several_models_are_told_apart(server):
    with fakes.serve(gateways.engine(input_shape=(), input_dtype=np.float32)) as other:
        app = App(Repository({"a": ServedModel("a", server), "b": ServedModel("b", other)}), LongWork())
        assert infer(app, gateways.body(ROW), "/v2/models/a/infer").json["model_name"] == "a"
        assert infer(app, gateways.body(np.float32([5])), "/v2/models/b/infer").json["outputs"][0]["data"] == [5, 0]
        assert [entry["name"] for entry in call(app, "POST", "/v2/repository/index").json] == ["a", "b"]
        assert len(call(app, "GET", "/v2/models/stats").json["model_stats"]) == 2
        text = call(app, "GET", "/metrics").content.decode()
        assert text.count("# TYPE superserve_arrivals_total counter") == 1
        assert text.count("\nsuperserve_arrivals_total{") == 2


# -- paths and methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/nothing", "docs/network.md"),
        ("GET", "/v2/models", "docs/network.md"),
        ("GET", "/v2/models/supernet/nothing", "docs/network.md"),
        ("GET", "/v2/models/supernet/", "docs/network.md"),
        ("GET", "/v2/models/supernat", "did you mean 'supernet'?"),
        ("POST", "/v2/models/supernat/infer", "did you mean 'supernet'?"),
        ("GET", "/v2/models/supernet/versions/2", "its only version is '1'"),
        ("POST", "/v2/models/supernet/versions/2/infer", "its only version is '1'"),
        ("GET", "/v2/models/supernet/versions/", "its only version is '1'"),
        ("GET", "/" + "x" * 60_000, "docs/network.md"),
    ],
    ids=lambda value: value[-40:],
)
def test_an_unknown_path_is_404(app, method, path, message):
    answer = call(app, method, path)
    assert answer.status == 404
    assert message in answer.error
    assert len(answer.error) < 500


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", INFER, "POST"),
        ("GET", "/v2/repository/index", "POST"),
        ("POST", "/v2", "GET, HEAD"),
        ("POST", MODEL, "GET, HEAD"),
        ("DELETE", "/v2/models/stats", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_and_tells_the_right_one(app, method, path, allowed):
    answer = call(app, method, path)
    assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert f"use {allowed}" in answer.error


def test_a_wrong_body_of_an_index_is_400(app):
    for wrong in (b"[]", b'{"ready": 1}', b"\xff"):
        assert "send" in call(app, "POST", "/v2/repository/index", wrong).error
