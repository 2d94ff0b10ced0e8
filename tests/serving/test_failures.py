"""Failing engines in the real server: engines without a model and, at the end, real executables.

One file because the tests share their failing engines.
"""

import itertools
import math
import sys
import threading
import time

import hypothesis
import jax
import numpy as np
import pytest
from fakes import LONG_MS, WAIT_S, Gate, fail, x
from hypothesis import strategies
from one_subnet import OUT_OF_MEMORY, PROFILE, ROW, fake, largest, outcomes, serve, state
from tiny import TINY, random_images

from superserve_jax import errors
from superserve_jax.engines import base
from superserve_jax.engines.base import Wrapper
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.futures import Query
from superserve_jax.serving.retries import Retries
from superserve_jax.serving.server import Server


class Faulty:
    """An `on_run` hook that raises for some inputs, and remembers the batches."""

    def __init__(self, *poison):
        self.poison, self.batches = set(poison), []

    def __call__(self, subnet, batch_size, inputs):
        self.batches.append([float(i) for i in inputs])
        if self.poison & set(self.batches[-1]):
            raise RuntimeError("bad luck")


# -- poisoned inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("position", [1, 7, 16])
def test_a_poisoned_input_is_named_and_the_rest_of_its_batch_is_answered(workers, position):
    faulty = Faulty(position)
    with serve(*(fake(faulty, name=f"fake:{i}") for i in range(workers))) as s:
        queries = s.submit_many([x(i) for i in range(1, 17)])
        *others, error = sorted(outcomes(queries), key=lambda o: (isinstance(o, Exception), o))
        assert others == [i for i in range(1, 17) if i != position]
        assert queries[position - 1].exception() is error
        named = (
            rf"input of shape \(\), dtype float32, values from {position} to {position}: . batches with it .*alone.*bad luck"
        )
        with pytest.raises(errors.InferenceError, match=named):
            queries[position - 1].result(0)
        assert s.health()["alive"] == workers


def test_finding_a_poisoned_input_costs_a_logarithm_of_its_batch():
    faulty = Faulty(5)
    with serve(fake(faulty)) as s:
        outcomes(s.submit_many([x(i) for i in range(1, 17)]))
    assert [len(b) for b in faulty.batches if any(b)] == [16, 8, 8, 4, 4, 2, 2, 1, 1]
    assert len(faulty.batches) == 9 + 5  # each failure is followed by one batch of blank inputs


@hypothesis.given(poison=strategies.sets(strategies.integers(1, 40)), workers=strategies.integers(1, 3))
@hypothesis.settings(max_examples=25, deadline=None)
def test_whatever_is_poisoned_gets_an_error_and_nothing_else_does(poison, workers):
    faulty = Faulty(*poison)
    with serve(*(fake(faulty, name=f"fake:{i}") for i in range(workers))) as s:
        answers = outcomes(s.submit_many([x(i) for i in range(1, 41)]))
        assert s.health()["alive"] == workers
    assert {i for i, o in enumerate(answers, 1) if isinstance(o, errors.InferenceError)} == poison
    assert all(o == i for i, o in enumerate(answers, 1) if i not in poison)


def test_a_worker_that_gets_only_poisoned_inputs_stays():
    with serve(fake(Faulty(*range(1, 50))), max_failures=1) as s:
        for i in range(1, 50):
            assert isinstance(s.submit(x(i)).exception(WAIT_S), errors.InferenceError)
        assert (state(s)["state"], state(s)["failures"], state(s)["batches"]) == ("idle", 49 * 3, 0)


def test_beside_a_broken_worker_only_poisoned_inputs_fail():
    broken, sound = fake(fail, name="broken"), fake(Faulty(3), name="sound")
    with serve(broken, sound, slo_ms=1, max_failures=50) as s:
        for _ in range(5):
            answers = outcomes(s.submit_many([x(i) for i in range(1, 9)], slo_ms=LONG_MS))
            assert [isinstance(o, Exception) for o in answers] == [i == 3 for i in range(1, 9)]


def test_a_worker_that_fails_on_batches_that_others_answer_leaves():
    with serve(fake(fail, name="broken"), fake(name="sound"), slo_ms=1, max_failures=2) as s:
        while s.health()["alive"] == 2:
            assert outcomes(s.submit_many([x(i) for i in range(8)], slo_ms=LONG_MS)) == list(range(8))
        assert (state(s, "broken")["state"], state(s, "broken")["failures"]) == ("left", 2)
        assert "the device burns" in state(s, "broken")["last_error"]
        assert state(s, "sound")["last_error"] is None


def test_a_failed_batch_runs_on_another_worker_first():
    ran = []

    def choke(name):
        def on_run(subnet, batch_size, inputs):
            if 9 in inputs:
                ran.append(name)
                raise RuntimeError("bad luck")

        return on_run

    names = ["fake:0", "fake:1"]
    with serve(*(fake(choke(name), name=name) for name in names)) as s:
        s.submit(x(9)).exception(WAIT_S)
    assert [a != b for a, b in itertools.pairwise(ran)] == [True, True]


def test_a_batch_goes_whole_to_another_worker_before_it_is_halved():
    waiting, now = Retries(PROFILE, max_tries=3), {"now_s": 0.0, "workers": 2}
    batch, before, failed_on = [Query(x(i), 0.0, LONG_MS, 0.0) for i in range(16)], None, 0
    sizes = []
    while not (hopeless := waiting.failed(batch, before, failed_on, **now)):
        assert waiting.find(failed_on, workers=2) is None
        failed_on = 1 - failed_on
        before = waiting.find(failed_on, workers=2)
        batch = before.waiting.drain()
        sizes.append(len(batch))
        waiting.groups.clear()
    assert sizes == [16, 8, 4, 2, 1, 1]  # alone on both
    assert [query for query, _ in hopeless] == batch


# -- outputs ------------------------------------------------------------------------------------------------------------------


class Logits(FakeEngine):
    """Logits (x, 1) for input x, checked with `check_outputs` as the `Engine` protocol demands."""

    def run(self, subnet, batch_size, inputs):
        super().run(subnet, batch_size, inputs)
        logits = self.spoil(np.array([[float(v), 1.0] for v in inputs], np.float32))
        base.check_outputs(logits, len(inputs))
        return [row.copy() for row in logits]

    def spoil(self, logits):
        return logits


class AllNan(Logits):
    def spoil(self, logits):
        return np.full_like(logits, np.nan)


class WrongShape(Logits):
    def spoil(self, logits):
        return logits[:, :, None].T


def test_an_input_whose_output_is_nan_fails_alone():
    with serve(fake(make=Logits)) as s:
        answers = s.submit_many([x(v) for v in (1, 2, math.nan, 4, math.inf)])
        with pytest.raises(errors.InferenceError, match=r"values from nan to nan.*outputs \[0\] of 1 have NaN"):
            answers[2].result(WAIT_S)
        assert [f.result(WAIT_S).output[0] for i, f in enumerate(answers) if i != 2] == [1, 2, 4, math.inf]
        assert s.health()["alive"] == 1


@pytest.mark.parametrize(("make", "message"), [(AllNan, "have NaN"), (WrongShape, "outputs of shape")])
def test_a_worker_whose_every_output_is_wrong_leaves(make, message):
    with serve(fake(make=make, name="bad"), fake(make=Logits, name="good"), slo_ms=1, max_failures=2) as s:
        while s.health()["alive"] == 2:
            assert [f.result(WAIT_S).output[0] for f in s.submit_many([x(1), x(2)], slo_ms=LONG_MS)] == [1, 2]
        assert state(s, "bad")["state"] == "left"
        assert message in state(s, "bad")["last_error"]


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (16, 5, 4)])
def test_outputs_pass_unless_one_of_them_is_nan(shape):
    for value in (0.0, -math.inf, 1e30, math.inf):
        logits = np.full(shape, 2.0, np.float32)
        logits[0, 0], logits[-1, -1] = value, -value
        base.check_outputs(logits, shape[0])
    logits[-1, -1] = math.nan
    with pytest.raises(errors.InferenceError, match=rf"\[{shape[0] - 1}\] of {shape[0]} have NaN"):
        base.check_outputs(logits, shape[0])


# -- hanging ------------------------------------------------------------------------------------------------------------------


def test_a_batch_may_take_twenty_times_its_profiled_p99():
    now_s, gate = [0.0], Gate()
    slow = Profile((1,), (Row(ROW.subnet, 0.7, (50.0,), (100.0,)),))
    engines = [FakeEngine(slow, speed=math.inf, on_run=gate, name=f"fake:{i}") for i in range(2)]
    options = {"policy": largest, "slo_ms": LONG_MS, "tune_runtime": False}
    with Server.from_engines(engines, slow, stall_s=1.0, clock=lambda: now_s[0], **options) as s:
        first = s.submit(x(0))
        assert gate.entered.wait(WAIT_S)
        now_s[0] = 1.99
        time.sleep(0.6)  # some rounds of the watchdog
        assert (s.health()["abandoned"], s.health()["running"]) == (0, 1)
        now_s[0] = 20.0  # on a busy machine the watchdog itself is late, and allows for that
        assert first.result(WAIT_S).output == (0.0, 0)
        assert sorted(w["state"] for w in s.health()["per_worker"]) == ["abandoned", "idle"]
        gate.opened.set()


def test_an_input_that_hangs_its_worker_costs_no_more_workers_than_it_has_tries():
    opened = threading.Event()

    def on_run(subnet, batch_size, inputs):
        if 13 in inputs:
            opened.wait(WAIT_S)

    with serve(*(fake(on_run, name=f"fake:{i}") for i in range(4)), stall_s=0.02, max_tries=2) as s:
        with pytest.raises(errors.InferenceError, match=r"2 batches.*has not returned for"):
            s.submit(x(13)).result(WAIT_S)
        assert (s.health()["alive"], s.health()["abandoned"]) == (2, 2)
        assert s.submit(x(1)).result(WAIT_S).output == (1.0, 0)
        opened.set()


def test_a_batch_that_hangs_is_not_halved():
    opened, batches = threading.Event(), []

    def on_run(subnet, batch_size, inputs):
        batches.append(len(inputs))
        if len(batches) == 1:
            opened.wait(WAIT_S)

    with serve(*(fake(on_run, name=f"fake:{i}") for i in range(2)), stall_s=0.02) as s:
        assert outcomes(s.submit_many([x(i) for i in range(16)])) == list(range(16))
        opened.set()
    assert batches == [16, 16]


def test_a_worker_that_hangs_on_blank_inputs_is_abandoned_too():
    opened = threading.Event()

    def on_run(subnet, batch_size, inputs):
        if 13 in inputs:
            fail()
        opened.wait(WAIT_S)

    with serve(fake(on_run, name="bad"), stall_s=0.02) as s:
        with pytest.raises(errors.WorkersLostError, match="bad has not returned for"):
            s.submit(x(13)).result(WAIT_S)
        opened.set()


# -- real executables ---------------------------------------------------------------------------------------------------------


class Injecting(Wrapper):
    """A device's engine with a hook that can raise or change the inputs."""

    def __init__(self, real, hook):
        super().__init__(real)
        self._hook = hook

    def run(self, subnet, batch_size, inputs):
        self._hook(batch_size, inputs)
        return super().run(subnet, batch_size, inputs)


def test_real_executables_answer_as_the_model_does_whatever_happens_around_them(export):
    [subnet] = export.subnets
    real = DeviceEngine(export, jax.devices()[0], subnet_list=[subnet], batch_sizes=(1, 2, 4))
    images = random_images(TINY, 16)
    calls = itertools.count()

    def hook(batch_size, inputs):
        if batch_size > 2:
            raise RuntimeError(OUT_OF_MEMORY)
        if any(np.array_equal(i, images[5]) for i in inputs) or next(calls) % 7 == 3:
            raise RuntimeError("bad luck")

    profile = Profile((1, 2, 4), (Row(subnet, 0.5, (1.0, 1.0, 1.0)),))
    with Server.from_engines([Injecting(real, hook)], profile, policy="max-batch", slo_ms=LONG_MS) as s:
        answers = s.submit_many(list(images))
        with pytest.raises(errors.InferenceError, match=r"shape \(9, 9, 1\), dtype uint8"):
            answers[5].result(WAIT_S)
        assert (state(s, real.name)["max_batch"], s.health()["alive"]) == (2, 1)
    expected = np.asarray(export(images, subnet))
    for i, f in enumerate(answers):
        if i != 5:
            np.testing.assert_allclose(f.result(0).output, expected[i], atol=1e-5 * np.abs(expected).max())


def test_an_error_that_is_its_own_cause_is_an_error_like_any_other():
    def on_run(*_):
        error = RuntimeError("round and round")
        raise error from error

    with serve(fake(on_run), max_failures=1) as s, pytest.raises(errors.SuperServeError, match="round and round"):
        s.submit(x(1), slo_ms=50.0).result(WAIT_S)


def test_a_server_that_cannot_be_opened_leaves_the_process_as_it_was():
    before, threads = sys.getswitchinterval(), threading.active_count()
    with pytest.raises(errors.UnknownNameError):
        Server.from_engines([fake()], PROFILE, policy="nope", tune_runtime=True)
    assert (sys.getswitchinterval(), threading.active_count()) == (before, threads)
