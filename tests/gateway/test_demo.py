"""The demo's traffic: who may change it, how far, and that queries arrive."""

import json

import fakes
import gateways
import numpy as np
import pytest
from fakes import BUCKETED
from gateways import request

from superserve_jax import gateway
from superserve_jax.gateway.demo import Demo, examples
from superserve_jax.gateway.model import ServedModel
from superserve_jax.serving.options import InputSpec

DEMO = {"gateway_options": {"demo": True}}


@pytest.fixture(scope="module")
def opened():
    with gateways.opened(**DEMO) as both:
        yield both


def ask(door, origin="same", content=None, host=None, **values):
    """A request for traffic, as the page sends it."""
    own = door.url.removeprefix("http://")
    headers = {"content_type": "application/json", "host": host or own}
    if origin is not None:
        headers["origin"] = f"http://{host or own}" if origin == "same" else origin
    body = json.dumps({"model": "supernet", **values}) if content is None else content
    return request(door, "POST", "/demo", body.encode(), **headers)


def arrived(server):
    return server.snapshot()["queries"]["arrived"]


def test_a_burst_reaches_the_server_without_a_page():
    with gateways.opened(**DEMO) as (server, door):
        before = arrived(server)
        answer = ask(door, burst_qps=500)
        assert answer.status == 200
        assert (answer.json["burst_qps"], 0 < answer.json["left_s"] <= 4) == (500, True)
        fakes.wait_until(lambda: arrived(server) > before + 100)


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://localhost:1", "file://", "127.0.0.1", "\xff"])
def test_another_page_may_not_send_traffic(opened, origin):
    server, door = opened
    before = arrived(server)
    answer = ask(door, origin, burst_qps=500)
    assert answer.status == 403
    assert "a page of another site" in answer.error
    assert arrived(server) == before


def test_a_foreign_name_that_leads_to_this_machine_is_refused(opened):
    answer = ask(opened[1], host="evil.example:8000", burst_qps=500)
    assert answer.status == 403
    assert "the header Host is" in answer.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": "supernet", "burst_qps": 1e9}', "burst_qps is 1e+09, expected a rate from 0 to"),
        ('{"model": "supernet", "steady_qps": -1}', "the body is not a request for traffic"),
        ('{"model": "supernet", "steady_qps": NaN}', "the body is not a request for traffic"),
        ('{"model": "supernet", "steady_qps": true}', "the body is not a request for traffic"),
        ('{"model": "other", "steady_qps": 1}', "unknown model 'other'"),
        ('{"steady_qps": 1}', "missing required field `model`"),
        ("", "the body is not a request for traffic"),
        ("[" * 2000, "the body is not a request for traffic"),
        (" " * 5000, "more than 4,096 bytes"),
    ],
)
def test_a_wrong_request_is_refused(opened, content, message):
    answer = ask(opened[1], content=content)
    assert answer.status in (400, 404, 413)
    assert message in answer.error


def test_other_methods_are_refused(opened):
    answer = request(opened[1], "GET", "/demo")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_there_is_no_control_without_the_demo():
    with gateways.opened() as (server, door):
        assert ask(door, burst_qps=10).status == 404
        assert arrived(server) == 1  # which asked for the shape of outputs


def test_steady_traffic_flows_while_somebody_looks():
    watched = []
    with fakes.serve(gateways.engine()) as server:
        demo = Demo(ServedModel("a", server), lambda: bool(watched))
        demo.start()
        try:
            demo.set(steady_qps=1000)
            assert arrived(server) == 1
            watched.append(True)
            fakes.wait_until(lambda: arrived(server) > 200)
        finally:
            demo.close()


def test_the_demo_ends_with_its_server():
    with gateways.opened(**DEMO) as (server, door):
        ask(door, burst_qps=500)
        server.close()
        assert request(door, "GET", "/").status == 200


def test_each_model_has_its_own_traffic():
    with fakes.serve(gateways.engine()) as one, fakes.serve(gateways.engine()) as other:
        with gateway.Gateway({"one": one, "other": other}, port=0, demo=True) as door:
            before = arrived(one)
            ask(door, model="other", burst_qps=500)
            fakes.wait_until(lambda: arrived(other) > 100)
        assert arrived(one) == before


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float32, np.float16, np.bool_])
def test_examples_fit_the_engine(dtype):
    spec_of = gateways.engine(input_dtype=dtype)
    with fakes.serve(spec_of) as server:
        for x in examples(ServedModel("a", server)):
            InputSpec.of(spec_of).check(x)


def test_texts_have_several_lengths_and_no_padding():
    profile = BUCKETED
    with fakes.serve(gateways.engine(profile=profile), profile=profile, policy="fixed:0") as server:
        made = examples(ServedModel("a", server))
        assert len({len(x) for x in made}) > 10
        assert all((x == [1, 0]).all() and server.inputs.check(x).shape == x.shape for x in made)  # token id and token type
