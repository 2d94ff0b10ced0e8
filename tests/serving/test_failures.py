"""Engines and policies that raise, hang or give wrong outputs, in the real server. One engine has real executables.

One file because the tests share their failing engines.
"""

import functools
import itertools
import math
import re
import sys
import threading
import time

import fakes
import hypothesis
import jax
import numpy as np
import pytest
from fakes import LONG_MS, SUBNETS, WAIT_S, Faulty, Gate, fail, held, idle_worker, outcomes, wait_until, worker, x
from hypothesis import strategies
from one_subnet import OUT_OF_MEMORY, PROFILE, ROW, fake, largest, serve, several
from tiny import TINY, random_images

from superserve_jax import errors
from superserve_jax.engines import base
from superserve_jax.engines.base import Wrapper
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.engines.fake import FakeDevice, FakeEngine
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.futures import Query
from superserve_jax.serving.retries import Retries
from superserve_jax.serving.server import Server
from superserve_jax.subnet import Subnet

# -- poisoned inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("position", [1, 7, 16])
def test_a_poisoned_input_is_named_and_the_rest_of_its_batch_is_answered(workers, position):
    with serve(*several(workers, Faulty(position))) as s:
        answers = outcomes(s.submit_many(x(range(1, 17))))
        error = answers.pop(position - 1)
        assert answers == [i for i in range(1, 17) if i != position]
        assert isinstance(error, errors.InferenceError)
        assert isinstance(error.__cause__, RuntimeError)
        named = rf"fake:. failed on the input of shape \(\), dtype float32, values from {position} to {position}"
        assert re.search(named + r": \d batches with it .*alone.*bad luck.*server's log", str(error))
        assert s.health()["alive"] == workers


def test_finding_a_poisoned_input_costs_a_logarithm_of_its_batch():
    faulty = Faulty(5)
    with serve(fake(faulty)) as s:
        outcomes(s.submit_many(x(range(1, 17))))
    assert [len(b) for b in faulty.batches if any(b)] == [16, 8, 8, 4, 4, 2, 2, 1, 1]
    assert len(faulty.batches) == 9 + 5  # each failure is followed by one batch of blank inputs
    queries = s.snapshot()["queries"]
    assert (queries["met"], queries["failed"]) == (15, 1)
    assert queries["requeued"] == 16 + 8 + 4 + 2  # whole, then each failed half; not the query that failed alone


@hypothesis.given(poison=strategies.sets(strategies.integers(1, 40)), workers=strategies.integers(1, 3))
@hypothesis.settings(max_examples=25, deadline=None)
def test_whatever_is_poisoned_gets_an_error_and_nothing_else_does(poison, workers):
    with serve(*several(workers, Faulty(*poison))) as s:
        answers = outcomes(s.submit_many(x(range(1, 41))))
        assert s.health()["alive"] == workers
    assert {i for i, o in enumerate(answers, 1) if isinstance(o, errors.InferenceError)} == poison
    assert all(o == i for i, o in enumerate(answers, 1) if i not in poison)


def test_a_worker_that_gets_only_poisoned_inputs_stays():
    with serve(fake(Faulty(*range(1, 50))), max_failures=1) as s:
        for i in range(1, 50):
            assert isinstance(s.submit(x(i)).exception(WAIT_S), errors.InferenceError)
        assert (idle_worker(s)["failures"], worker(s)["batches"]) == (49 * 3, 0)


def test_beside_a_broken_worker_only_poisoned_inputs_fail():
    with serve(fake(fail, name="broken"), fake(Faulty(3), name="sound"), slo_ms=1, max_failures=50) as s:
        for _ in range(5):
            answers = outcomes(s.submit_many(x(range(1, 9)), slo_ms=LONG_MS))
            assert [isinstance(o, Exception) for o in answers] == [i == 3 for i in range(1, 9)]


def test_a_failed_batch_runs_on_another_worker_first():
    ran = []

    def choke(name, subnet, batch_size, inputs):
        if 9 in inputs:
            ran.append(name)
            fail()

    with serve(*(fake(functools.partial(choke, name), name=name) for name in ("a", "b"))) as s:
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
    """Logits (x, 1) for input x, changed by `spoil` and checked with `check_outputs`, as the `Engine` protocol demands."""

    def __init__(self, *args, spoil=lambda logits: logits, **options):
        super().__init__(*args, **options)
        self.spoil = spoil

    def run(self, subnet, batch_size, inputs):
        super().run(subnet, batch_size, inputs)
        logits = self.spoil(np.array([[float(v), 1.0] for v in inputs], np.float32))
        base.check_outputs(logits, len(inputs))
        return [row.copy() for row in logits]


def test_an_input_whose_output_is_nan_or_infinite_fails_alone():
    with serve(fake(make=Logits)) as s:
        answers = outcomes(s.submit_many(x([1, 2, math.nan, 4, math.inf])))
        for value in ("inf", "nan"):
            message = rf"values from {value} to {value}.*outputs \[0\] of 1 are NaN or infinite"
            with pytest.raises(errors.InferenceError, match=message):
                raise answers.pop(4 if value == "inf" else 2)
        assert answers == [1, 2, 4]
        assert s.health()["alive"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fail, "the device burns"),
        (lambda logits: np.full_like(logits, np.nan), "are NaN"),
        (lambda logits: logits[:, :, None].T, "outputs of shape"),
    ],
    ids=["raises", "NaN", "wrong shape"],
)
def test_a_worker_that_fails_on_batches_that_others_answer_leaves(spoil, message):
    bad, good = fake(make=Logits, name="bad", spoil=spoil), fake(make=Logits, name="good")
    with serve(bad, good, slo_ms=1, max_failures=2) as s:
        while s.health()["alive"] == 2:
            assert outcomes(s.submit_many(x([1, 2]), slo_ms=LONG_MS)) == [1, 2]
        assert (worker(s, "bad")["state"], worker(s, "bad")["failures"]) == ("left", 2)
        assert message in worker(s, "bad")["last_error"]
        assert worker(s, "good")["last_error"] is None


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (16, 5, 4)])
def test_outputs_pass_unless_the_largest_number_of_one_is_not_finite(shape):
    for value in (0.0, -math.inf, 1e30, -1e30):
        logits = np.full(shape, 2.0, np.float32)
        logits[-1, :1] = value
        base.check_outputs(logits, shape[0])
    for place, value in ((0, math.nan), (0, math.inf), (slice(None), -math.inf)):
        logits = np.full(shape, 2.0, np.float32)
        logits[-1, place] = value
        with pytest.raises(errors.NotFiniteError, match=rf"\[{shape[0] - 1}\] of {shape[0]} are NaN or infinite"):
            base.check_outputs(logits, shape[0])


# -- hanging ------------------------------------------------------------------------------------------------------------------


def test_a_batch_may_take_twenty_times_its_profiled_p99():
    now_s, slow = [0.0], Profile((1,), (Row(ROW.subnet, 0.7, (50.0,), (100.0,)),))
    with held(2, profile=slow, policy=largest, stall_s=1.0, clock=lambda: now_s[0]) as (s, _, first):
        now_s[0] = 1.99
        time.sleep(0.6)  # some rounds of the watchdog
        assert (s.health()["abandoned"], s.health()["running"]) == (0, 1)
        now_s[0] = 20.0  # on a busy machine the watchdog itself is late, and allows for that
        assert outcomes([first]) == [0]
        wait_until(lambda: sorted(w["state"] for w in s.health()["per_worker"]) == ["abandoned", "idle"])


def test_an_input_that_hangs_its_worker_costs_no_more_workers_than_it_has_tries():
    opened = threading.Event()
    with serve(*several(4, lambda *batch: 13 in batch[2] and opened.wait(WAIT_S)), stall_s=0.2, max_tries=2) as s:
        with pytest.raises(errors.InferenceError, match=r"2 batches.*has not returned for"):
            s.submit(x(13)).result(WAIT_S)
        assert (s.health()["alive"], s.health()["abandoned"]) == (2, 2)
        assert outcomes([s.submit(x(1))]) == [1]
        opened.set()


def test_a_batch_that_hangs_is_not_halved():
    gate = Gate()
    with serve(*several(2, gate), stall_s=0.2) as s:
        futures = s.submit_many(x(range(16)))
        with gate.holding():
            assert outcomes(futures) == list(range(16))
    assert [len(batch) for batch in gate.batches] == [16, 16]


def test_a_worker_that_hangs_on_blank_inputs_is_abandoned_too():
    opened = threading.Event()
    with serve(fake(lambda *batch: fail() if 13 in batch[2] else opened.wait(WAIT_S)), stall_s=0.2) as s:
        with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
            s.submit(x(13)).result(WAIT_S)
        opened.set()


# -- real executables ---------------------------------------------------------------------------------------------------------


def test_real_executables_answer_as_the_model_does_whatever_happens_around_them(export):
    [subnet] = export.subnets
    engine = Wrapper(DeviceEngine(export, jax.devices()[0], subnet_list=[subnet], batch_sizes=(1, 2, 4)))
    images, calls = random_images(TINY, 16), itertools.count()

    def run(subnet, batch_size, inputs, real=engine.run):
        if batch_size > 2:
            raise RuntimeError(OUT_OF_MEMORY)
        if any(np.array_equal(i, images[5]) for i in inputs) or next(calls) % 7 == 3:
            raise RuntimeError("bad luck")
        return real(subnet, batch_size, inputs)

    engine.run = run
    profile = Profile((1, 2, 4), (Row(subnet, 0.5, (1.0, 1.0, 1.0)),))
    with Server.from_engines([engine], profile, policy="max-batch", slo_ms=LONG_MS) as s:
        answers = s.submit_many(images)
        with pytest.raises(errors.InferenceError, match=r"shape \(9, 9, 1\), dtype uint8"):
            answers.pop(5).result(WAIT_S)
        assert (worker(s, engine.name)["max_batch"], s.health()["alive"]) == (2, 1)
    expected = np.delete(np.asarray(export(images, subnet)), 5, axis=0)
    np.testing.assert_allclose([f.result(0).output for f in answers], expected, atol=1e-5 * np.abs(expected).max())


# -- other errors -------------------------------------------------------------------------------------------------------------


def test_an_error_that_is_its_own_cause_is_an_error_like_any_other():
    def on_run(*_):
        error = RuntimeError("round and round")
        raise error from error

    with serve(fake(on_run), max_failures=1) as s, pytest.raises(errors.SuperServeError, match="round and round"):
        s.submit(x(1), slo_ms=50.0).result(WAIT_S)


def test_a_server_that_cannot_be_opened_leaves_the_process_as_it_was():
    before, threads = sys.getswitchinterval(), threading.enumerate()
    with pytest.raises(errors.UnknownNameError):
        serve(policy="nope", tune_runtime=True)
    assert sys.getswitchinterval() == before
    # Only its own threads count: those of other libraries come and go.
    assert not [t for t in threading.enumerate() if t not in threads and t.name.startswith("superserve")]


# -- all tries failed, no worker left, failing policies, stuck workers --------------------------------------------------------


def test_a_batch_that_failed_is_tried_again():
    failures = iter([fail, lambda *_: None, fail])  # in between it is asked whether it can do anything
    with fakes.serve(fakes.fake(lambda *a: next(failures, lambda *_: None)(*a))) as s:
        assert s.submit(x(3)).result(WAIT_S).output == (3.0, 0)
        assert (s.health()["failures"], s.health()["alive"]) == (2, 1)
        assert "the device burns" in s.health()["last_error"]


def test_a_failed_query_without_slack_is_not_tried_again():
    now_s = [0.0]

    def slow_failure(*_):
        now_s[0] += 1.0
        fail()

    with fakes.serve(fakes.fake(slow_failure), clock=lambda: now_s[0]) as s:
        with pytest.raises(errors.InferenceError, match="no slack was left"):
            s.submit(x(1), slo_ms=500).result(WAIT_S)
        assert s.health()["failures"] == 1


def test_when_the_last_worker_leaves_everything_fails_with_the_cause_until_another_joins():
    with held(then=fail, max_failures=1) as (s, gate, first):
        futures = [first, *s.submit_many(x(range(5)))]
        gate.opened.set()
        for f in futures:
            with pytest.raises(errors.WorkersLostError, match=r"last of 1 workers.*the device burns"):
                f.result(WAIT_S)
        for ask in (lambda: s.submit(x(1)), s.pool.swaps.swappable):
            with pytest.raises(errors.WorkersLostError, match=r"the device burns.*add a worker or open a new server"):
                ask()
        assert s.health()["alive"] == 0
        assert s.add_worker(fakes.fake()) == "fake:0"
        assert outcomes([s.submit(x(1))]) == [1]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (fail, "the device burns"),
        (lambda *_: Decision(Subnet((9,)), 1), "not in the profile"),
        (lambda *_: Decision(SUBNETS[0], 0), "whole number from 1 up, got 0"),
        (lambda *_: None, "it returned None"),
    ],
    ids=["raises", "unknown subnet", "empty batch", "no decision"],
)
def test_a_policy_that_fails_fails_its_queries_and_no_worker(policy, message):
    with fakes.serve(policy=policy) as s:
        for _ in range(3):
            with pytest.raises(errors.InferenceError, match=f"the policy '.*' failed.*{message}.*fix it"):
                s.submit(x(1)).result(WAIT_S)
        assert (s.health()["alive"], s.health()["failures"], s.snapshot()["queries"]["failed"]) == (1, 0, 3)


@pytest.mark.parametrize(("make", "running"), [(FakeEngine, 4), (FakeDevice, 8)])
def test_the_batches_of_a_stuck_worker_are_answered_by_another_and_its_late_answers_dropped(make, running):
    gate, answers = Gate(), []
    with fakes.serve(fakes.fake(gate, make=make), stall_s=0.3) as s:
        futures = s.submit_many(x(range(12)))
        futures[0].add_done_callback(answers.append)
        with gate.holding():
            s.add_worker(fakes.fake(name="fake:1"))
            assert outcomes(futures) == list(range(12))
            assert (s.health()["alive"], s.health()["abandoned"]) == (1, 1)
        assert outcomes([s.submit(x(1))]) == [1]
    counts = s.snapshot()
    assert [w["state"] for w in counts["workers"]] == ["abandoned", "left"]
    assert (counts["queries"]["met"], counts["queries"]["requeued"], counts["running"]) == (13, running, 0)
    assert answers == futures[:1]


@pytest.mark.parametrize("make", [FakeEngine, FakeDevice])
def test_when_the_only_worker_is_stuck_its_queries_fail(make):
    gate = Gate()
    with fakes.serve(fakes.fake(gate, make=make), stall_s=0.05) as s:
        futures = s.submit_many(x(range(12)))
        with gate.holding():
            for f in futures:
                with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
                    f.result(WAIT_S)
            assert s.health()["abandoned"] == 1


def test_a_process_that_stood_still_before_a_batch_began_does_not_extend_the_time_limit_of_the_batch():
    now_s = [0.0]
    with held(clock=lambda: now_s[0], stall_s=1.0) as (s, _, first):
        s.pool.abandon_stuck(excused_s=1e3)
        now_s[0] = 5.0
        s.pool.abandon_stuck()
        assert s.health()["abandoned"] == 1
        with pytest.raises(errors.WorkersLostError, match="fake:0 has not returned for"):
            first.result(WAIT_S)
