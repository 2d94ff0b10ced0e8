"""A server under its name: how many rows a request may have, and positions of subnets."""

import dataclasses

import fakes
import gateways
import numpy as np
import pytest
from fakes import LONG_MS, SUBNETS
from gateways import INFER, call

from superserve_jax import errors
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.model import ServedModel
from superserve_jax.profile import Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.futures import Reply

ROW = np.uint8([[[7, 2], [3, 4]]])


def infer(app, array, **fields):
    return call(app, "POST", INFER, gateways.body(array, **fields))


@pytest.mark.parametrize("limit", [{"max_queue": 5}, {"max_queue_bytes": 20}])
def test_more_rows_than_the_queue_holds_are_not_worth_another_try(limit):
    with fakes.serve(gateways.engine(), **limit) as s:
        app = gateways.app(s)
        assert infer(app, np.tile(ROW, (5, 1, 1))).status == 200
        answer = infer(app, np.tile(ROW, (6, 1, 1)))
        assert answer.status == 400
        assert "has 6 inputs, but at most 5 may wait; split it" in answer.error
        assert "retry-after" not in answer.headers


def test_more_tokens_than_the_queue_holds_are_not_worth_another_try():
    profile = fakes.BUCKETED
    with fakes.serve(profile=profile, policy="fixed:0", max_queue_bytes=4 * 64 * 2) as s:
        app = gateways.app(s)
        assert infer(app, np.ones((2, 60), np.int32)).status == 200
        assert infer(app, np.ones((5, 9), np.int32)).status == 200
        answer = infer(app, np.ones((3, 60), np.int32))
        assert (answer.status, answer.headers.get("retry-after")) == (400, None)
        assert "too many for the queue; split it" in answer.error


def test_a_worker_with_subnets_of_its_own_gives_them_a_position():
    def decide(profile, state):
        return Decision(profile.rows[-1].subnet, 4)

    own = dataclasses.replace(fakes.PROFILE, rows=(Row(SUBNETS[0], 0.7, (1.0,) * 3), Row(fakes.Subnet((9,)), 0.9, (1.0,) * 3)))
    with fakes.serve(gateways.engine(), policy=decide) as s:
        app = gateways.app(s)
        assert infer(app, ROW).json["parameters"]["subnet"] == "2"
        s.add_worker(gateways.engine(name="new", profile=own), profile=own)
        s.remove_worker("fake:0")
        found = infer(app, ROW).json["parameters"]
        assert (found["subnet"], found["accuracy"]) == ("3", 0.9)
        fakes.idle_worker(s, "new")
        assert set(s.snapshot()["subnets"]) == {"2", "3"}


def test_a_subnet_that_no_worker_has_is_minus_one():
    with fakes.serve(gateways.engine()) as s:
        model = ServedModel("a", s)
        reply = Reply(np.float32([1, 2]), fakes.Subnet((77,)), 0.5, True, 3.0, 1.0, 2.0, 1)
        body, _ = model.write(model.read(gateways.body(ROW), None), [reply])
        assert b'"subnet":"-1"' in body


def test_the_longest_body_follows_the_size_of_an_input():
    with fakes.serve(gateways.engine(input_shape=(1000,))) as s:
        assert ServedModel("a", s).max_body_bytes == 1024 * 1000 * 4 + 65536
        assert ServedModel("a", s, Limits(max_body_bytes=10)).max_body_bytes == 10


@pytest.mark.parametrize("name", ["", "a/b", ".a", "stats", "x" * 101, 5])
def test_a_wrong_name_is_refused(name):
    with fakes.serve(gateways.engine()) as s, pytest.raises(errors.ConfigError, match="cannot be the name of a model"):
        ServedModel(name, s)


def test_a_long_deadline_is_no_error():
    with fakes.serve(gateways.engine()) as s:
        assert infer(gateways.app(s), ROW, parameters={"timeout": int(1e3 * LONG_MS)}).status == 200


class Images(gateways.LogitsEngine):
    """An engine whose outputs are images."""

    def _outputs(self, subnet, inputs):
        return [np.float32([[1, 2], [3, 4]])] * len(inputs)


def test_classes_are_refused_before_the_inference_if_there_are_none():
    outputs = [{"name": "output", "parameters": {"classification": 1}}]
    with fakes.serve(fakes.fake(make=Images, input_shape=(2, 2), input_dtype=np.uint8)) as s:
        app = gateways.app(s)
        assert infer(app, ROW).json["outputs"][0]["shape"] == [1, 2, 2]
        before = s.snapshot()["queries"]["arrived"]
        answer = infer(app, ROW, outputs=outputs)
        assert (answer.status, s.snapshot()["queries"]["arrived"]) == (400, before)
        assert "no vector of logits" in answer.error
