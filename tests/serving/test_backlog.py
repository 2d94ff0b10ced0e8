"""The waiting queries of a server: floors that no subnet meets any more, and another profile after a swap."""

import threading

import pytest
from fakes import BUCKETED, FASTER, PROFILE, tokens, x
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.serving.backlog import Backlog
from superserve_jax.serving.flight import Failure, Flight
from superserve_jax.serving.futures import Query
from superserve_jax.serving.options import check_options
from superserve_jax.serving.telemetry import Counters
from superserve_jax.serving.threads import Outbox

ITEMS = st.lists(st.tuples(st.floats(0, 10), st.sampled_from([0.0, 0.5, 0.7, 0.9]), st.integers(1, 64)), max_size=20)


def filled(profile, items, defer_s=-1.0):
    q = length_queue.make_queue(profile)
    for i, (deadline_s, floor, length) in enumerate(items):
        q.push(deadline_s, i, floor, length)
    q.defer(defer_s)
    return q


@pytest.mark.parametrize("profile", [PROFILE, BUCKETED])
@given(items=ITEMS, defer_s=st.floats(-1, 10), accuracy=st.sampled_from([0.0, 0.6, 0.7, 1.0]))
def test_a_queue_removes_only_the_queries_with_higher_floors_and_keeps_its_order(profile, items, defer_s, accuracy):
    q, whole = filled(profile, items, defer_s), filled(profile, items, defer_s)
    above = {i for i, (_, floor, _) in enumerate(items) if floor > accuracy}
    assert set(q.pop_above(accuracy)) == above
    assert (len(q), q.pop_above(accuracy)) == (len(items) - len(above), [])
    if profile is PROFILE:  # else the head's batch takes only some
        kept = q.head_floors(99)
        assert any(kept) == any(0 < floor <= accuracy for _, floor, _ in items)
        assert any(kept) == bool(kept)
    assert q.drain() == [i for i in whole.drain() if i not in above]


@given(ITEMS, st.floats(0, 10))
def test_a_retimed_queue_equals_one_that_always_had_the_new_profile(items, time_s):
    q, expected = filled(BUCKETED, items), filled(FASTER, items)
    q.retime(FASTER)
    assert (q.pushed, q.dispersion, q.head_work, q.due_by(time_s)) == (
        expected.pushed,
        expected.dispersion,
        expected.head_work,
        expected.due_by(time_s),
    )
    assert q.pop_before(time_s) == expected.pop_before(time_s)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(0, 8), st.floats(0.1, 10))
def test_a_meter_reads_the_same_in_other_units(arrivals, change, factor):
    meter, expected, total = ArrivalMeter(), ArrivalMeter(), 0
    for i, count in enumerate(arrivals):
        total += count
        if i == change:
            meter.rescale(factor)
        unit = factor if i >= change else 1.0
        reading, plain = meter.read(0.03 * i, total * unit, unit), expected.read(0.03 * i, total)
        assert reading == pytest.approx((plain[0] * unit, plain[1] * unit**2), abs=1e-9)


def backlog_after_a_failure(profile, query):
    """The waiting queries of two workers, after the query has failed on the first worker."""
    counters, outbox = Counters(profile), Outbox(threading.RLock())
    backlog = Backlog(profile, check_options({}), input_bytes=4, outbox=outbox, counters=counters)
    flight = Flight(profile.rows[0], [query], 0, None, "", 0.0)
    backlog.retry(flight, Failure.of(ValueError()), worker=0, name="fake:0", workers=2, now_s=0.0)
    return backlog


def test_failed_queries_run_again_by_the_new_profile():
    query = Query(tokens(5), 0.0, 1.0, 0.0)
    query.length = 5
    backlog = backlog_after_a_failure(BUCKETED, query)
    backlog.retime(FASTER)
    assert backlog.retries.find(0, workers=2) is None
    retry = backlog.retries.find(1, workers=2)
    assert retry is not None
    assert retry.waiting.head_work == filled(FASTER, [(1.0, 0.0, 5)]).head_work


def test_a_group_whose_batch_is_given_back_keeps_its_number_of_failures():
    query = Query(x(5), 0.0, 1.0, 0.0)
    backlog = backlog_after_a_failure(PROFILE, query)
    retry = backlog.retries.find(1, workers=2)
    again = Flight(PROFILE.rows[0], retry.waiting.drain(), 0, retry, "", 0.0)
    backlog.give_back(again, 1)
    given_back = backlog.retries.find(0, workers=2)
    assert (given_back.failures, given_back.waiting.drain()) == (1, [query])
