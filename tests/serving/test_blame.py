"""A subnet whose outputs are not finite is taken out of service. The device is not blamed, and no query is lost."""

import functools
import logging
import math
import time

import fakes
import jax
import numpy as np
import pytest
import small_exports
from fakes import LONG_MS, PROFILE, SUBNETS, WAIT_S, always, by_slack, idle_worker, outcomes, serve, wait_until, worker, x

import superserve_jax as ss
from superserve_jax import errors, machine
from superserve_jax.engines import base
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.exports import profile_path
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import ByProfile, Decision, Fixed, SlackFit

pytestmark = pytest.mark.usefixtures("no_test_hangs")

BAD = SUBNETS[2]
NAN = r"NotFiniteError\('outputs \[0.*\] of \d are NaN or infinite"


class Spoilt(FakeEngine):
    """An engine whose subnets `bad` answer with `value`. It remembers what ran, without blank inputs."""

    def __init__(self, *args, bad=(BAD,), value=math.nan, **options):
        super().__init__(*args, **options)
        self.bad, self.value, self.ran = bad, value, []

    def run(self, subnet, batch_size, inputs):
        outputs = super().run(subnet, batch_size, inputs)
        if any(inputs):
            self.ran.append(subnet)
        logits = np.array([[float(v), self.value if subnet in self.bad else 1.0] for v in inputs], np.float32)
        base.check_outputs(logits, len(inputs))
        return outputs


spoilt = functools.partial(fakes.fake, make=Spoilt)


def out_of_service(s, name="fake:0"):
    return [(entry["subnet"], entry["accuracy"]) for entry in worker(s, name)["out_of_service"]]


ALWAYS_BAD = {
    "a function": always(2),
    "the default": "slackfit",
    "most accurate": "max-acc",
    "an object for the whole profile": SlackFit(PROFILE),
    "an object for each profile": ByProfile(SlackFit, PROFILE),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ALWAYS_BAD)
def test_the_subnet_is_taken_out_of_service_and_others_answer(caplog, policy, value):
    engine = spoilt(value=value)
    with serve(engine, policy=ALWAYS_BAD[policy], max_tries=1, max_failures=1) as s:
        for _ in range(5):
            futures = s.submit_many(x(range(1, 9)), slo_ms=LONG_MS)
            assert outcomes(futures) == list(range(1, 9))
            assert {f.result().subnet for f in futures} <= set(SUBNETS[:2])
        assert engine.ran.count(BAD) == 1
        health = idle_worker(s)
        assert health["failures"] == 1
        [entry] = health["out_of_service"]
        assert (entry["subnet"], entry["accuracy"]) == (BAD.to_json(), 0.8)
        assert "NotFiniteError" in entry["cause"]
        assert s.snapshot()["workers"][0]["out_of_service"] == [entry]
        assert s.snapshot()["queries"]["failed"] == 0
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.75"):
            s.submit(x(1), min_accuracy=0.8)
        assert outcomes([s.submit(x(7), min_accuracy=0.75)]) == [7]
    assert sum("is out of service on fake:0" in r.getMessage() and r.levelno == logging.ERROR for r in caplog.records) == 1


def test_the_next_less_accurate_subnet_runs_for_a_policy_object_that_insists():
    with serve(spoilt(bad=SUBNETS[1:]), policy=always(2)) as s:
        assert s.submit(x(1)).result(WAIT_S).subnet == SUBNETS[0]
        assert out_of_service(s) == [(SUBNETS[2].to_json(), 0.8), (SUBNETS[1].to_json(), 0.75)]
    with serve(spoilt(bad=SUBNETS[:1]), policy=always(0)) as s:  # there is no less accurate one
        assert s.submit(x(1)).result(WAIT_S).subnet == SUBNETS[1]


def test_an_error_names_the_policy_while_a_subnet_is_out_of_service():
    decisions = [Decision(BAD, 4)]

    def mine(profile, state):
        return decisions.pop()

    with serve(spoilt(), policy=mine) as s, pytest.raises(errors.PolicyError, match="policy 'mine' failed: IndexError"):
        s.submit(x(1)).result(WAIT_S)


def test_waiting_queries_that_only_the_bad_subnet_could_answer_are_refused():
    with serve(spoilt(), policy=always(2)) as s:
        low, high = s.submit(x(1)), s.submit(x(2), min_accuracy=0.8)
        assert low.result(WAIT_S).output[0] == 1
        with pytest.raises(errors.AccuracyFloorError, match=r"0\.75"):
            high.result(WAIT_S)


@pytest.mark.parametrize("count", [2, 4])
def test_every_worker_finds_it_for_itself_and_no_query_is_lost(count):
    engines = [spoilt(lambda *_: time.sleep(2e-3), name=f"fake:{i}") for i in range(count)]
    with serve(*engines, policy=always(2), max_failures=1) as s:
        wait_until(lambda: outcomes(s.submit_many(x(range(1, 30)))) == list(range(1, 30)) and all(e.ran for e in engines))
        assert s.health()["alive"] == count
        assert s.snapshot()["queries"]["failed"] == 0
        assert all(engine.ran.count(BAD) <= 1 for engine in engines)


def test_a_device_that_fails_with_every_subnet_is_to_blame():
    with serve(spoilt(name="bad", bad=SUBNETS), spoilt(name="good", bad=()), policy=by_slack, slo_ms=1, max_failures=2) as s:
        while s.health()["alive"] == 2:
            assert outcomes(s.submit_many(x([1, 2]), slo_ms=LONG_MS)) == [1, 2]
        assert (worker(s, "bad")["state"], worker(s, "bad")["out_of_service"]) == ("left", [])


def test_a_subnet_that_raises_another_error_is_a_failure_of_the_device_as_before():
    def burns(subnet, batch_size, inputs):
        if subnet == BAD:
            fakes.fail()

    with serve(fakes.fake(burns), policy=always(2), max_failures=1) as s:
        with pytest.raises(errors.SuperServeError):
            s.submit(x(1)).result(WAIT_S)
        wait_until(lambda: s.health()["alive"] == 0)


def test_a_poisoned_input_takes_no_subnet_out_of_service():
    engine = spoilt(bad=())
    with serve(engine, policy=always(2)) as s:
        answers = outcomes(s.submit_many(x([1, math.nan, 3])))
        assert isinstance(answers.pop(1), errors.InferenceError)
        assert answers == [1, 3]
        assert out_of_service(s) == []


def test_it_stays_out_of_service_with_smaller_batches():
    def cramped(subnet, batch_size, inputs):
        if batch_size > 2 and subnet != BAD:
            raise MemoryError

    engine = spoilt(cramped)
    with serve(engine, policy=always(2)) as s:
        for _ in range(3):
            assert outcomes(s.submit_many(x(range(1, 9)))) == list(range(1, 9))
        assert worker(s)["max_batch"] == 2
        assert engine.ran.count(BAD) == 1


def test_a_device_that_computes_ahead_gives_both_batches_back():
    class Ahead(FakeDevice):
        def launch(self, subnet, batch_size, inputs):
            launched = super().launch(subnet, batch_size, inputs)

            def outputs():
                found = launched.outputs()
                base.check_outputs(np.full((len(inputs), 1), math.nan if subnet == BAD else 1.0), len(inputs))
                return found

            return launched._replace(outputs=outputs)

    with serve(fakes.fake(make=Ahead), policy=always(2), overlap=True, max_failures=1, max_tries=1) as s:
        assert outcomes(s.submit_many(x(range(1, 40)))) == list(range(1, 40))
        assert (s.health()["alive"], out_of_service(s)) == (1, [(BAD.to_json(), 0.8)])


# -- a policy that is fixed to the bad subnet ---------------------------------------------------------------------------------

FIXED = {name: name for name in ("fixed:2", "fixed:largest")} | {"an object": Fixed(PROFILE, BAD)}


@pytest.mark.parametrize("policy", FIXED)
@pytest.mark.parametrize("count", [1, 2])
def test_queries_of_a_policy_fixed_to_it_fail_with_subnet_and_cause_and_the_server_goes_on(policy, count):
    engines = [spoilt(name=f"fake:{i}") for i in range(count)]
    with serve(*engines, policy=FIXED[policy]) as s:
        wait_until(lambda: s.submit(x(1)).exception(WAIT_S) and all(worker(s, e.name)["out_of_service"] for e in engines))
        ran = [len(engine.ran) for engine in engines]
        for _ in range(10):
            with pytest.raises(errors.InferenceError, match=rf"subnet .*gates.*\[2\].* is out of service.*{NAN}"):
                s.submit(x(1)).result(WAIT_S)
        assert ran == [len(engine.ran) for engine in engines]
        assert s.health()["alive"] == count


def test_a_device_is_to_blame_if_another_one_works_with_the_only_subnet_of_the_policy():
    bad, good = spoilt(name="bad"), spoilt(name="good", bad=())
    with serve(bad, good, policy="fixed:2", slo_ms=1, max_failures=2) as s:
        while s.health()["alive"] == 2:
            assert outcomes(s.submit_many(x([1, 2]), slo_ms=LONG_MS)) == [1, 2]
        assert worker(s, "bad")["state"] == "left"
        assert outcomes(s.submit_many(x([1, 2]))) == [1, 2]


def test_a_policy_fixed_to_another_subnet_is_not_affected():
    with serve(spoilt(), policy="fixed:1") as s:
        assert outcomes(s.submit_many(x([1, 2]))) == [1, 2]
        assert out_of_service(s) == []


@pytest.mark.parametrize("count", [1, 2])
def test_under_a_fixed_policy_a_subnet_that_runs_because_of_a_floor_goes_as_usual(count):
    engines = [spoilt(name=f"fake:{i}", bad=SUBNETS[1:2]) for i in range(count)]
    with serve(*engines, policy="fixed:0", max_tries=1, max_failures=1) as s:
        for _ in range(3):
            futures = s.submit_many(x(range(1, 9)), min_accuracy=0.75)
            assert outcomes(futures) == list(range(1, 9))
            assert {f.result().subnet for f in futures} == {SUBNETS[2]}
        assert {f.result().subnet for f in s.submit_many(x([1, 2])) if f.exception(WAIT_S) is None} == {SUBNETS[0]}
        assert sum(engine.ran.count(SUBNETS[1]) for engine in engines) <= count
        assert s.health()["alive"] == count


def test_a_floor_that_only_the_bad_subnet_meets_is_refused_under_a_fixed_policy():
    engine = spoilt()
    with serve(engine, policy="fixed:0") as s:
        for _ in range(3):
            with pytest.raises(errors.AccuracyFloorError):
                s.submit(x(1), min_accuracy=0.8).result(WAIT_S)
        assert engine.ran == [BAD]
        assert outcomes([s.submit(x(2))]) == [2]
        assert s.health()["alive"] == 1


# -- real executables ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_bucket(tmp_path_factory):
    """An export whose two subnets share a subnet bucket, and the subnets."""
    path = small_exports.write(tmp_path_factory.mktemp("blame") / "export", small_exports.IMAGES)
    served = ss.load(path).served
    small, large = sorted((s.subnet for s in served), key=lambda s: sum(s.gates))
    rows = tuple(Row(s.subnet, s.accuracy, (1.0, 1.5)) for s in served)
    kind = machine.device_kind(jax.devices()[0])
    Profile((1, 2), rows, kind).with_envelopes({small: large, large: large}).save(profile_path(path, kind))
    return path, small, large


def spoil(path, subnet):
    model = ss.load(path)
    model.statistics[subnet] = np.full_like(model.statistics[subnet], math.nan)
    return model


IMAGE = np.zeros((4, 4, 1), np.uint8)


def test_one_bad_subnet_of_a_shared_subnet_bucket_goes_and_a_swap_starts_afresh(shared_bucket):
    path, small, large = shared_bucket
    options = {
        "batch_sizes": (1, 2),
        "slo_ms": LONG_MS,
        "devices": jax.devices()[:1],
        "max_failures": 1,
        "tune_runtime": False,
    }
    with ss.Server(spoil(path, small), policy=lambda profile, state: Decision(small, 2), **options) as s:
        [name] = [w["name"] for w in s.health()["per_worker"]]
        assert {f.result(WAIT_S).subnet for f in s.submit_many([IMAGE] * 5)} == {large}
        assert [subnet for subnet, _ in out_of_service(s, name)] == [small.to_json()]
        s.swap(path)
        assert s.submit(IMAGE).result(WAIT_S).subnet == small
        assert (s.health()["alive"], out_of_service(s, name)) == (1, [])


def test_a_server_does_not_open_with_a_subnet_that_fails_in_its_warm_up_and_names_it(shared_bucket):
    path, _, large = shared_bucket
    with pytest.raises(errors.NotFiniteError, match=r"subnet .*gates.*NaN or infinite.*calibrate and export it again"):
        ss.Server(spoil(path, large), batch_sizes=(1, 2), devices=jax.devices()[:1])
