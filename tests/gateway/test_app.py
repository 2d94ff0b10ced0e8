"""Inference without sockets: requests, deadlines, errors and their statuses, and clients that go away."""

import asyncio
import gzip
import json
import logging
import urllib.parse

import fakes
import gateways
import numpy as np
import pytest
from fakes import LONG_MS
from gateways import INFER, call
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.gateway import failures
from superserve_jax.serving import Server

ROW = np.uint8([[[7, 2], [3, 4]]])


def infer(app, content, path=INFER, **options):
    return call(app, "POST", path, content, **options)


# -- inference ----------------------------------------------------------------------------------------------------------------


def test_rows_are_answered_by_the_subnet_of_the_policy(app):
    found = infer(app, gateways.body(np.uint8([[[7, 2], [3, 4]], [[9, 2], [3, 4]]]), id="a")).json
    [output] = found["outputs"]
    assert (output["shape"], output["data"], output["datatype"]) == ([2, 2], [7, 2, 9, 2], "FP32")
    assert (found["id"], found["model_name"], found["model_version"]) == ("a", "supernet", "1")
    told = found["parameters"]
    assert (told["subnet"], told["accuracy"], told["met_slo"]) == ("2,2", 0.8, True)
    assert 0 <= told["queue_ms"] <= told["latency_ms"]


def test_binary_in_and_out(app):
    content, length = gateways.binary_body(ROW, parameters={"binary_data_output": True})
    answer = infer(app, content, headers=[(b"inference-header-content-length", b"%d" % length)])
    assert answer.headers["content-type"] == "application/octet-stream"
    told = int(answer.headers["inference-header-content-length"])
    assert np.frombuffer(answer.content[told:], np.float32).tolist() == [7, 2]
    assert answer.json["outputs"][0]["parameters"] == {"binary_data_size": 8}


def test_values_per_row_and_classes_on_request(app):
    outputs = [{"name": "met_slo"}, {"name": "output", "parameters": {"classification": 1}}]
    found = infer(app, gateways.body(np.uint8([[[7, 2], [3, 4]], [[1, 2], [3, 4]]]), outputs=outputs)).json["outputs"]
    assert found[0] == {"name": "met_slo", "datatype": "BOOL", "shape": [2], "data": [True, True]}
    assert found[1]["data"] == ["7:0:cat", "2:1:dog"]


@pytest.mark.parametrize(
    ("parameters", "headers", "slo_ms"),
    [
        ({"slo_ms": 5, "timeout": 7000}, {"x-slo-ms": "9"}, 5),
        ({"timeout": 7000}, {"x-slo-ms": "9"}, 7),
        ({}, {"x-slo-ms": "9", "x-slo-ttft-ms": "11"}, 9),
        ({}, {"x-slo-ttft-ms": "11.5"}, 11.5),
        ({}, {}, None),
    ],
)
def test_the_deadline_of_a_request(server, app, monkeypatch, parameters, headers, slo_ms):
    asked, real = [], Server.submit

    def submit(self, x, *, slo_ms, min_accuracy):
        asked.append((slo_ms, min_accuracy))
        return real(self, x, slo_ms=LONG_MS, min_accuracy=min_accuracy)

    monkeypatch.setattr(Server, "submit", submit)
    content = gateways.body(ROW, parameters={"min_accuracy": 0.75, **parameters})
    assert infer(app, content, headers=[(k.encode(), v.encode()) for k, v in headers.items()]).status == 200
    assert asked == [(slo_ms, 0.75)]


def test_a_late_answer_is_200_and_says_so(app):
    answer = infer(app, gateways.body(ROW, parameters={"slo_ms": 1e-6}))
    assert (answer.status, answer.json["parameters"]["met_slo"]) == (200, False)


def test_an_answer_is_compressed_if_the_client_accepts_that(app):
    answer = infer(app, gateways.body(np.tile(ROW, (4000, 1, 1))), headers=[(b"accept-encoding", b"gzip")])
    assert answer.headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(answer.content))["outputs"][0]["shape"] == [4000, 2]


def test_a_large_compressed_body_is_inflated(app):
    noise = np.random.default_rng(0).integers(0, 256, (4000, 2, 2), np.uint8)
    packed = gzip.compress(gateways.body(noise))
    answer = infer(app, packed, headers=[(b"content-encoding", b"gzip")])
    assert answer.json["outputs"][0]["data"][::2] == noise[:, 0, 0].tolist()
    assert infer(app, packed[:-1], headers=[(b"content-encoding", b"gzip")]).status == 400


def test_a_body_may_be_compressed(app):
    packed = gzip.compress(gateways.body(ROW))
    assert infer(app, packed, headers=[(b"content-encoding", b"gzip")]).status == 200
    answer = infer(app, packed, headers=[(b"content-encoding", b"br")])
    assert answer.status == 415
    assert "gzip or deflate" in answer.error


# -- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slo_ms": 0}, "slo_ms must be a positive"),
        ({"slo_ms": -5}, "slo_ms must be a positive"),
        ({"slo_ms": 1e300}, "slo_ms must be a positive"),
        ({"min_accuracy": 0.9}, "the best served subnet has 0.8"),
        ({"slo_ms": True}, "got `bool`"),
    ],
)
def test_a_wrong_parameter_is_400(app, parameters, message):
    answer = infer(app, gateways.body(ROW, parameters=parameters))
    assert answer.status == 400
    assert message in answer.error


@pytest.mark.parametrize("headers", [{"x-slo-ms": "fast"}, {"x-slo-ms": "1e999"}, {"inference-header-content-length": "-1"}])
def test_a_wrong_header_is_400(app, headers):
    assert infer(app, gateways.body(ROW), headers=[(k.encode(), v.encode()) for k, v in headers.items()]).status == 400


def test_a_long_body_is_413(app):
    answer = infer(app, bytes(2 << 20))
    assert answer.status == 413
    assert "1,048,576 bytes" in answer.error


def test_a_full_queue_is_429_and_says_when_to_try_again():
    valve = gateways.Valve()
    with fakes.serve(gateways.engine(valve), max_queue=1) as s:
        app = gateways.app(s)
        with valve.shut(s, ROW[0]):
            s.submit(ROW[0])
            answer = infer(app, gateways.body(ROW))
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    assert "queue" in answer.error


def test_an_expired_query_is_504():
    with fakes.serve(gateways.engine(), expire=True) as s:
        answer = infer(gateways.app(s), gateways.body(ROW, parameters={"slo_ms": 1e-6}))
    assert answer.status == 504
    assert "deadline" in answer.error


def test_a_failed_batch_is_500_and_logged(caplog):
    def fail_on_9(subnet, batch_size, inputs):
        if any(x.item(0) == 9 for x in inputs):
            raise RuntimeError("the device burns")

    with fakes.serve(gateways.engine(fail_on_9)) as s:
        answer = infer(gateways.app(s), gateways.body(np.uint8([[[9, 2], [3, 4]]])))
    assert answer.status == 500
    assert answer.error == "the model failed on this request; the log of the gateway has the reason"
    assert "the device burns" in caplog.text


def test_an_unexpected_error_is_500_and_logged(app, server, monkeypatch, caplog):
    monkeypatch.setattr(Server, "submit", lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.ERROR):
        answer = infer(app, gateways.body(ROW))
    assert answer.status == 500
    assert answer.error == "the gateway failed; its log has the reason"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InputError, 400),
        (errors.DeadlineError, 400),
        (errors.AccuracyFloorError, 400),
        (errors.QueueFullError, 429),
        (errors.AdmissionError, 429),
        (errors.ServerClosedError, 503),
        (errors.WorkersLostError, 503),
        (errors.DeadlineExpiredError, 504),
        (errors.InferenceError, 500),
        (errors.PolicyError, 500),
        (KeyError, 500),
    ],
)
def test_every_error_has_its_status(error, status):
    assert failures.status_of(error("x")) == status


# -- tasks that are cancelled, and a gateway that closes ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cancelled_task_cancels_its_queries_and_is_answered_503(rows):
    valve = gateways.Valve()

    async def cancel_it(app):
        task = asyncio.create_task(app.answer(gateways.message("POST", INFER, gateways.body(np.tile(ROW, (rows, 1, 1))))))
        while s.health()["waiting"] < rows:
            await asyncio.sleep(1e-3)
        task.cancel()
        return await task

    with fakes.serve(gateways.engine(valve)) as s:
        app = gateways.app(s)
        with valve.shut(s, ROW[0]):
            answer = asyncio.run(cancel_it(app))
        fakes.wait_until(lambda: s.snapshot()["queries"]["cancelled"] == rows)
    assert answer.status == 503
    assert b"shutting down" in answer.body


def test_a_gateway_that_closes_is_not_ready_but_answers(server):
    app = gateways.app(server)
    app.draining = True
    assert call(app, "GET", "/v2/health/ready").status == 503
    assert infer(app, gateways.body(ROW)).status == 200


# -- whatever comes -----------------------------------------------------------------------------------------------------------

NAMES = ("inference-header-content-length", "x-slo-ms", "x-slo-ttft-ms", "content-encoding", "accept-encoding", "accept")
VALUES = st.binary(max_size=6) | st.sampled_from([b"gzip", b"deflate", b"0", b"1", b"90", b"36", b"1e3", b"nan", b"q=0,;"])
PATHS = (
    *("/v2", "/v2/models/supernet", "/v2/models/stats", "/v2/repository/index", "/v2/health/ready", "/metrics"),
    *(INFER, f"{INFER}?a=b", "/v2/models/supernet/%69nfer"),
)


@given(
    st.sampled_from(["GET", "POST", "HEAD", "PUT", "\xff"]),
    st.sampled_from(PATHS)
    | st.builds(str.__add__, st.sampled_from(["/", "/v2/models/"]), st.text(max_size=8).map(urllib.parse.quote)),
    st.sampled_from([gateways.body(ROW), gateways.body(ROW)[:40], b"", b"{}"]) | st.binary(max_size=20),
    st.dictionaries(st.sampled_from(NAMES).map(str.encode), VALUES, max_size=3),
)
def test_every_request_gets_an_answer_or_an_error_that_is_the_clients(app, method, path, content, headers):
    answer = call(app, method, path, content, headers.items())
    assert answer.status in (200, 400, 404, 405, 413, 415)
    if answer.status == 200 and "nfer" in path:
        assert method == "POST"
        assert answer.json["model_name"] == "supernet"
    if answer.status != 200:
        assert len(answer.error) > 10
