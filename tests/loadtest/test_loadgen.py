import contextlib
import dataclasses
import time
import types

import numpy as np
import pytest
from policy_cases import make_profile

from superserve_jax import errors
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest import loadgen, sim_vs_real
from superserve_jax.loadtest.loadgen import Replay
from superserve_jax.loadtest.sim_vs_real import Machine, Stopwatch
from superserve_jax.profile import Profile
from superserve_jax.serving.futures import Future, Reply
from superserve_jax.serving.server import Server
from superserve_jax.simulation import metrics, traces
from superserve_jax.simulation.traces import Trace

PROFILE = make_profile([(1.0, 2.0), (2.0, 4.0)], [0.7, 0.9], batch_sizes=(1, 4))


class Classifier(FakeEngine):
    """Answers scores whose largest is at the input's value."""

    def run(self, subnet, batch_size, inputs):
        return [np.eye(10)[int(value)] for value, _ in super().run(subnet, batch_size, inputs)]


@pytest.fixture
def trace():
    return traces.gamma(rate_qps=300.0, duration_s=0.5, slo_ms=200.0)


def test_mistyped_policies_are_reported_without_a_profile(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, profile):\n        assert profile.latency_ms\n")
    good = ["slackfit", "slackfit-paper:8", "fixed:1", "fixed:largest", "fixed:all", f"{tmp_path}/mine.py:Mine"]
    loadgen.check_policies(good, (1, 4), subnets=2)
    for bad, message in [("slakfit", "slackfit"), ("fixed:2", "0 to 1"), (f"{tmp_path}/mine.py:Mien", "Mine")]:
        with pytest.raises(errors.SuperServeError, match=message):
            loadgen.check_policies([bad], (1, 4), subnets=2)


MINE = """
from superserve_jax import Decision

def careless(profile, state):
    good = [row for row in profile.rows if profile.latency_ms(row.subnet, 1) <= state.slack_ms]
    return Decision(good[-1].subnet, 1)

def forgetful(profile, state):
    good = [row for row in profile.rows if profile.latency_ms(row.subnet, 1) <= state.slack_ms]
    if good:
        return Decision(good[-1].subnet, 1)

def greedy(profile, state):
    return Decision(profile.rows[0].subnet, profile.batch_sizes[state.waiting - 1])

def careful(profile, state):
    return Decision(profile.rows[0].subnet, 1)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("careless", r"'careless' failed: IndexError\(.*mine\.py:6, `return Decision.*slack_ms=-1000\.0"),
        ("forgetful", r"'forgetful' failed: it returned None.*mine\.py:8, `def forgetful"),
        ("greedy", r"'greedy' failed: IndexError.*waiting=10000"),
        ("careful", None),
    ],
)
def test_the_rehearsal_asks_a_policy_in_extreme_states(tmp_path, name, message):
    (tmp_path / "mine.py").write_text(MINE)
    trace = Trace(np.arange(3.0), 1_000.0)  # without any trouble
    refused = pytest.raises(errors.PolicyError, match=message) if message else contextlib.nullcontext()
    with refused:
        loadgen.rehearse(f"{tmp_path}/mine.py:{name}", [PROFILE], trace)


def test_every_query_is_submitted_in_time_and_answered_with_its_own_output(trace):
    values = np.random.default_rng(0).integers(10, size=len(trace))
    trace = Trace(trace.arrivals_s, 3_000.0)  # the machine may stand still for a second or two
    with sim_vs_real.heartbeat() as stalls_s, Server.from_engines([Classifier(PROFILE)], PROFILE, slo_ms=200.0) as target:
        done = loadgen.replay(target, trace, [np.float32(v) for v in values])
    np.testing.assert_array_equal(done.label, values)
    assert done.met.mean() > 0.9
    assert (done.lateness_s >= 0).all()
    assert np.median(done.lateness_s) < 0.1 + sum(until_s - from_s for from_s, until_s in stalls_s)
    assert (done.finish_s > done.arrival_s).all()
    assert set(np.unique(done.accuracy)) <= {0.7, 0.9}
    assert metrics.summary(done.arrival_s, done.deadline_s, done.finish_s, done.accuracy).queries == len(trace)


def test_what_is_unanswered_when_the_last_deadline_has_passed_is_a_miss_and_not_waited_for(trace):
    profile = PROFILE.scaled(200)  # 200 ms a query: five a second of three hundred
    with Server.from_engines([Classifier(profile)], profile, policy="fixed:0", slo_ms=200.0) as target:
        done = loadgen.replay(target, trace, [np.float32(0)] * len(trace))
        target.close(drain=False)
    assert np.isinf(done.finish_s).any()
    assert (done.label[np.isinf(done.finish_s)] == -1).all()
    assert done.met.mean() < 0.5


def test_texts_are_replayed_with_the_lengths_that_they_have():
    profile, seen = Profile((1, 4), rows_at={8: PROFILE.scaled(0.1).rows, 16: PROFILE.rows}), []
    fake = FakeEngine(
        profile, input_shape=(16,), input_dtype=np.int32, on_run=lambda *args: seen.extend(len(x) for x in args[2])
    )
    trace = traces.gamma(rate_qps=200.0, duration_s=0.2, slo_ms=200.0).mixed(lengths={3: 1, 12: 1})
    inputs = [np.pad(np.full(n, 1, np.int32), (0, 16 - n)) for n in trace.lengths]
    watch = Stopwatch(fake, profile)
    with Server.from_engines([watch], profile, policy="fixed:0", slo_ms=200.0) as target:
        done = loadgen.replay(target, trace, inputs)
    assert sorted(seen) == sorted(trace.lengths.tolist())
    np.testing.assert_array_equal(done.lengths, trace.lengths)
    assert {ms for _, _, ms, _ in watch.batches} <= {0.1, 0.2, 1.0, 2.0}
    assert {ms for _, _, ms, _ in watch.batches} & {0.1, 0.2}
    done = dataclasses.replace(done, lateness_s=np.zeros(len(trace)))  # after a stall all would come at once, in full batches
    again = sim_vs_real.simulate_again(done, profile, "fixed:0", workers=1, machine=Machine(0.0, 0.0, ()))
    np.testing.assert_allclose((again.finish_s - again.start_s)[again.batch == 1].min(), 1e-4)


def test_a_late_generator_never_makes_a_deadline_later(trace):
    class Slow(Server):
        def submit_many(self, xs, **options):
            time.sleep(0.02)
            return super().submit_many(xs, **options)

    with Slow.from_engines([Classifier(PROFILE)], PROFILE, slo_ms=200.0) as target:
        done = loadgen.replay(target, trace, [np.float32(1)] * len(trace))
    assert np.percentile(done.lateness_s, 90) > 0.005
    np.testing.assert_allclose(done.deadline_s - done.arrival_s, 0.2)


class Recorder:
    """In the place of a server: notes submitted queries, and raises the error that `refuses` returns."""

    def __init__(self, refuses=lambda slo_ms, floor: None):
        self.groups, self.refuses = [], refuses

    def submit_many(self, xs, *, slo_ms, min_accuracy=0.0):
        if error := self.refuses(slo_ms, min_accuracy):
            raise error
        self.groups.append((list(xs), slo_ms, min_accuracy))
        answers = [Future() for _ in xs]
        for x, answer in zip(xs, answers, strict=True):
            answer.set_result(Reply(np.eye(10)[x], None, 0.9, True, 1.0, 0.5, 0.5, len(xs)))
        return answers


@pytest.fixture
def exact_sleep(monkeypatch):
    """A clock on which nothing but sleeping takes time, so that no query is late."""
    now_s = [100.0]

    def sleep(seconds):
        now_s[0] += seconds + 1e-6

    monkeypatch.setattr(loadgen, "time", types.SimpleNamespace(monotonic=lambda: now_s[0], sleep=sleep))


MIXED = Trace(np.zeros(6), np.array([30.0, 90.0, 30.0, 90.0, 30.0, 90.0]), np.array([0.0, 0.0, 0.8, 0.8, 0.0, 0.8]))


@pytest.mark.usefixtures("exact_sleep")
def test_queries_that_are_due_at_once_keep_their_own_slos_and_floors():
    target = Recorder()
    done = loadgen.replay(target, MIXED, list(range(6)))
    assert [(xs, floor) for xs, _, floor in target.groups] == [([0, 4], 0.0), ([1], 0.0), ([2], 0.8), ([3, 5], 0.8)]
    assert [slo_ms > 40 for _, slo_ms, _ in target.groups] == [False, True, False, True]
    assert all(slo_ms <= 90 for _, slo_ms, _ in target.groups)
    np.testing.assert_array_equal(done.label, range(6))
    again = sim_vs_real.simulate_again(done, PROFILE, "fixed:0", workers=1, machine=Machine(0.0, 0.0, ()))
    assert again.accuracy.tolist().count(0.9) >= 3  # those with a floor, which the smaller subnet does not reach


@pytest.mark.usefixtures("exact_sleep")
@pytest.mark.parametrize("error", [errors.QueueFullError("full"), errors.WorkersLostError("lost")])
def test_a_refused_query_counts_as_missed_and_ends_nothing(error):
    done = loadgen.replay(Recorder(lambda slo_ms, floor: error if floor else None), MIXED, list(range(6)))
    np.testing.assert_array_equal(np.isfinite(done.finish_s), MIXED.floors == 0)
    np.testing.assert_array_equal(np.isfinite(done.lateness_s), MIXED.floors == 0)
    assert done.label.tolist() == [0, 1, -1, -1, 4, -1]
    assert done.met.sum() == 3


def test_a_floor_that_no_subnet_reaches_is_an_error():
    error = errors.AccuracyFloorError("too high")
    with pytest.raises(errors.AccuracyFloorError):
        loadgen.replay(Recorder(lambda slo_ms, floor: error), MIXED, list(range(6)))


def test_a_trace_without_queries_is_refused():
    with pytest.raises(errors.DataError, match="has no queries"):
        loadgen.replay(Recorder(), Trace(np.zeros(0)), [])
    nothing = Replay(*[np.zeros(0)] * 7)
    with pytest.raises(errors.DataError, match="has no queries"):
        sim_vs_real.simulate_again(nothing, PROFILE, "fixed:0", workers=1, machine=Machine(0.0, 0.0, ()))


def test_the_generator_submits_what_is_due_at_most_every_millisecond():
    trace = traces.gamma(rate_qps=20_000.0, duration_s=0.05)
    sent = list(loadgen.submit_when_due(Recorder(), trace, [0] * len(trace)))
    assert [i for s in sent for i in s.places] == list(range(len(trace)))
    assert (np.diff([s.now_s for s in sent]) >= 1e-3).all()
    assert all(trace.arrivals_s[s.places[-1]] <= s.now_s for s in sent)
