"""The checker, fed with correct notes and with notes of one broken guarantee each; and the recorder."""

import collections
import math

import numpy as np
import pytest
from fakes import PROFILE, SUBNETS, always, fail, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.loadtest.checker import Checker
from superserve_jax.loadtest.recorder import Deliberate, Recorder
from superserve_jax.serving.futures import Reply

A, B = 101, 102  # threads


def offered(*keys, floor=0.0):
    return ("offered", keys, 0.0, 1000.0, floor)


def submitted(*keys, deadline_s=1.5, now_s=1.0, ordered=True):
    return ("submitted", keys, now_s, deadline_s, ordered)


def given_in(*keys, deadline_s=1.5, floor=0.0):
    return [offered(*keys, floor=floor), submitted(*keys, deadline_s=deadline_s)]


def begun(thread, *keys):
    return [("decided", thread), ("started", thread, keys)]


def ended(*keys, now_s=1.2):
    return [("finished", keys, now_s)]


def answered(key, *, now_s=1.3, met_slo=True, value=None, rank=1):
    output, accuracy = (key if value is None else value, rank), PROFILE.rows[rank].accuracy
    return [("resolved", key, now_s, "answered", Reply(output, SUBNETS[rank], accuracy, met_slo, 1.0, 1.0, 1.0, 1))]


def failed(key, outcome="InferenceError"):
    return [("resolved", key, 1.3, outcome, None)]


def run(thread, *keys):
    return [*begun(thread, *keys), *ended(*keys), *(note for key in keys for note in answered(key))]


def check(notes, *, pieces=(), strict_order=True, **options):
    checker = Checker(PROFILE, strict_order=strict_order, **options)
    for start, end in zip((0, *pieces), (*pieces, len(notes)), strict=True):
        checker.read(collections.deque(notes[start:end]))
    return checker.finish()


CORRECT = [
    *given_in(1, 2),
    *given_in(3, deadline_s=1.2),
    ("decided", A),
    *given_in(4, deadline_s=1.1),  # too late for A's decision
    ("decided", B),
    ("started", B, (4, 1)),
    ("started", A, (3,)),
    ("cancelling", 2),
    ("raised", (4, 1)),
    *failed(2, "cancelled"),
    *ended(3, now_s=1.1),
    *answered(3),
    *begun(A, 4),
    *ended(4),
    *answered(4, met_slo=False),
    ("decided", B),  # all queries of its batch were cancelled
    *begun(B, 1),
    *ended(1, now_s=1.6),
    *answered(1, now_s=1.7, met_slo=False),
    offered(5),
    ("refused", (5,), "QueueFullError"),
    ("read", 1, "answered"),
    ("read", 2, "cancelled"),
]


def test_correct_notes_are_counted_without_a_violation():
    result = check(CORRECT)
    assert result.examples == []
    assert (result.offered, result.lost, result.twice, result.violations, result.batches) == (5, 0, 0, 0, 4)
    assert result.outcomes == {"answered": 3, "cancelled": 1, "refused: QueueFullError": 1}
    assert result.compared == 2  # retries run ahead of their turn


@given(pieces=st.lists(st.integers(0, len(CORRECT))).map(sorted))
@settings(deadline=None)
def test_notes_may_be_read_in_any_pieces(pieces):
    broken = [*CORRECT, *given_in(6), *run(A, 6), *answered(6)]
    assert check(broken, pieces=pieces) == check(broken)


BROKEN = {
    "never resolved": given_in(1),
    "resolved again": [*given_in(1), *run(A, 1), *answered(1)],
    "was never offered": answered(1),
    "before any batch with it finished": [*given_in(1), *begun(A, 1), ("raised", (1,)), *answered(1)],
    "got the answer of query 2": [*given_in(1), *begun(A, 1), *ended(1), *answered(1, value=2)],
    "asked for an accuracy of 0.8": [*given_in(1, floor=0.8), *run(A, 1)],
    "says reply.met_slo=True": [*given_in(1), *begun(A, 1), *ended(1, now_s=1.6), *answered(1, now_s=1.7)],
    "says reply.met_slo=False": [*given_in(1), *begun(A, 1), *ended(1), *answered(1, met_slo=False)],
    "no client asked for it": [*given_in(1), *failed(1, "cancelled")],
    "was refused, but it ran": [offered(1), *begun(A, 1), ("refused", (1,), "QueueFullError")],
    "after it had ended: refused": [offered(1), ("refused", (1,), "QueueFullError"), *begun(A, 1)],
    "after it had ended: answered": [*given_in(1), *run(A, 1), *begun(A, 1)],
    "after it had ended: DeadlineExpiredError": [
        *given_in(1, deadline_s=1.3),
        *failed(1, "DeadlineExpiredError"),
        *begun(A, 1),
    ],
    "in time for its deadline": [*given_in(1), *failed(1, "DeadlineExpiredError")],
    "ran twice at once": [*given_in(1), *begun(A, 1), *begun(B, 1), *ended(1), *answered(1)],
    "got the deadline 2.5": [*given_in(1, deadline_s=2.5), *run(A, 1)],
    "but result() says: cancelled": [*given_in(1), *run(A, 1), ("read", 1, "cancelled")],
    "but result() had said: cancelled": [*given_in(1), ("read", 1, "cancelled"), *run(A, 1)],
    "undocumented error: TypeError": [*given_in(1), *failed(1, "TypeError")],
    "undocumented error: refused: KeyError": [offered(1), ("refused", (1,), "KeyError")],
    "passed over": [*given_in(1, deadline_s=1.2), *given_in(2), *run(A, 2), *run(A, 1)],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_guarantee_is_found(message):
    result = check(BROKEN[message])
    assert result.violations == 1
    assert message in result.examples[0]


def test_a_batch_is_compared_with_all_waiting_queries_even_if_its_start_is_noted_after_theirs():
    early, late = given_in(1, deadline_s=1.2), given_in(2)
    assert check([*early, *late, ("decided", A), *begun(B, 1), ("started", A, (2,)), *failed(1), *failed(2)]).violations == 1
    assert check([*early, *late, ("decided", A), *begun(B, 2), ("started", A, (1,)), *failed(1), *failed(2)]).violations == 0


@pytest.mark.parametrize(
    "notes",
    [
        [offered(1), *given_in(2), *begun(A, 2), submitted(1, deadline_s=1.2), *begun(B, 1)],  # may have come after
        [*given_in(1, deadline_s=1.2), *given_in(2), *begun(A, 2)],  # never taken: cancelled in the queue, or dropped
        [offered(1), submitted(1, deadline_s=1.2, ordered=False), *given_in(2), *begun(A, 2), *begun(B, 1)],  # was deferred
        [*given_in(1), *begun(A, 1), ("raised", (1,)), *given_in(2, deadline_s=1.2), *begun(A, 1), *begun(B, 2)],  # a retry
    ],
)
def test_a_query_is_not_passed_over_if_a_race_or_a_retry_explains_it(notes):
    assert check([*notes, *failed(1), *failed(2)]).violations == 0


def test_a_policy_that_defers_may_change_the_order_and_a_query_of_an_abandoned_worker_may_run_elsewhere():
    result = check(BROKEN["passed over"], strict_order=False)
    assert (result.violations, result.compared) == (0, 0)
    assert check(BROKEN["ran twice at once"], abandons=True).violations == 0


def test_a_decision_without_a_batch_does_not_hold_up_the_reading():
    checker = Checker(PROFILE, strict_order=True, patience_s=0)
    checker.read(collections.deque([("decided", A), *(note for key in range(1, 11) for note in given_in(key))]))
    assert checker.result.offered == 10


def test_resolved_queries_are_forgotten():
    # Those with late deadlines stay in the heap for a while, behind those with early ones.
    notes = [note for key in range(1, 10_001) for note in (*given_in(key, deadline_s=1.5 + 0.4 * (key % 2)), *run(A, key))]
    checker = Checker(PROFILE, strict_order=True)
    checker.read(collections.deque(notes))
    assert checker.size < 2_000


# -- the recorder -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder():
    return Recorder()


def recorded(recorder, on_run=None, **options):
    """A server whose engine and policy are recorded."""
    engine = recorder.engine(FakeEngine(PROFILE, speed=math.inf, input_dtype=np.int64, on_run=on_run))
    return serve(engine, policy=recorder.policy(always(1)), **options)


def test_the_recorder_notes_each_step_of_a_query(recorder):
    with recorded(recorder) as s:
        [(key, query)] = recorder.submit(s, 1, slo_ms=10_000.0)
        query.result(10)
    kinds = collections.Counter(note[0] for note in recorder.notes)
    assert key == 1
    assert kinds == dict.fromkeys(("offered", "submitted", "decided", "started", "finished", "resolved"), 1)


def test_the_recorder_notes_refusals_failures_and_cancellations(recorder):
    with recorded(recorder, fail, max_tries=1) as s:
        [(_, query)] = recorder.submit(s, 1, slo_ms=10_000.0)
        query.exception(10)
        s.close()
        assert recorder.submit(s, 2, slo_ms=10_000.0) == []
        recorder.cancel(1, query)
        recorder.read(1, query, 10)
    notes = list(recorder.notes)
    assert [note[1:] for note in notes if note[0] == "refused"] == [((2, 3), "ServerClosedError")]
    assert [note[3] for note in notes if note[0] == "resolved"] == ["InferenceError of RuntimeError"]
    assert notes[-2:] == [("cancelling", 1), ("read", 1, "InferenceError of RuntimeError")]
    assert ("raised", (1,)) in notes


def test_the_recorder_passes_on_what_a_generator_raises(recorder):
    def through(inputs):
        yield next(iter(inputs))
        raise Deliberate

    with recorded(recorder) as s:
        assert recorder.submit(s, 3, slo_ms=10_000.0, through=through) == []
        assert s.snapshot()["queries"]["arrived"] == 0
    assert recorder.notes[-1] == ("refused", (1, 2, 3), "Deliberate")
