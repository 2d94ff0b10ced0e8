"""An overloaded server: which queries it refuses, which it serves, and the cost of cancelled queries."""

import pytest
from fakes import PROFILE, held, outcomes, serve, tokens, x
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.profile import Profile
from superserve_jax.scheduling import length_queue
from superserve_jax.scheduling.admission import Admission
from superserve_jax.scheduling.queue import DeadlineQueue
from superserve_jax.scheduling.speeds import Fleet
from superserve_jax.serving.backlog import QueueLimits
from superserve_jax.serving.futures import Query
from superserve_jax.serving.options import Options
from superserve_jax.simulation import paper_profile, simulator, traces
from superserve_jax.simulation.cluster import Cluster

PAPER = paper_profile.paper_profile()
CAPACITY = 8 * PAPER.throughput_qps(PAPER.rows[0].subnet)
BY_LENGTH = Profile(PROFILE.batch_sizes, rows_at={4: PROFILE.rows, 8: PROFILE.scaled(2).rows})
MIX = {20.0: 1, 200.0: 1}


def simulated(load, mix, *, policy="slackfit", duration_s=2.0, **cluster):
    """For each SLO: which of its queries were admitted, and which were met."""
    trace = traces.gamma(rate_qps=load * CAPACITY, duration_s=duration_s).mixed(slo_ms=mix)
    result = simulator.simulate(PAPER, policy, trace, cluster=Cluster(max_queue=10_000, **cluster))
    of_each = [trace.slo_ms == slo_ms for slo_ms in mix]
    return [(result.outcome[of] != simulator.REFUSED, result.outcome[of] == simulator.MET) for of in of_each]


# -- the queue's bounds -------------------------------------------------------------------------------------------------------


def test_the_waiting_bytes_are_limited_and_a_refusal_names_the_limit():
    with held(max_queue_bytes=15) as (s, _, _):
        s.submit_many([x(1)] * 3)
        with pytest.raises(
            errors.QueueFullError, match=r"would exceed max_queue_bytes=15 \(4 each\); .* or raise max_queue_bytes$"
        ):
            s.submit(x(4))
        assert s.health()["waiting"] == 3


@given(st.integers(1, 200), st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), max_size=20))
def test_waiting_texts_never_exceed_the_limit_in_bytes(most, submits):
    waiting = length_queue.make_queue(BY_LENGTH)
    bounds = QueueLimits(BY_LENGTH, Options(max_queue=1000, max_queue_bytes=4 * most), input_bytes=4 * 8)
    kept = 0
    for lengths in submits:
        size = sum(4 if n <= 4 else 8 for n in lengths)
        try:
            bounds.make_room(waiting, len(lengths), lengths, Query.done)
        except errors.QueueFullError:
            assert kept + size > most
            continue
        kept += size
        assert kept <= most
        waiting.push_all(1.0, [Query(None, 0.0, 1.0, 0.0) for _ in lengths], 0.0, lengths)


# -- cancelled queries --------------------------------------------------------------------------------------------------------


def test_cancelled_queries_take_no_room_in_a_full_queue():
    with held(max_queue=8) as (s, gate, _):
        kept, *cancelled = s.submit_many(x(range(1, 9)))
        for _ in range(5):  # a client that cancels all its queries leaves room for others
            for future in cancelled:
                future.cancel()
            cancelled = s.submit_many([x(9)] * 7)
        gate.opened.set()
        assert outcomes([kept]) == [1]


def test_a_full_queue_is_not_searched_at_every_refusal():
    looked = []
    done = lambda item: looked.append(item) or False  # noqa: E731
    waiting, options = DeadlineQueue(), Options(max_queue=100, max_queue_bytes=1000)
    bounds = QueueLimits(PROFILE, options, input_bytes=4)
    for i in range(100):
        waiting.push(float(i), i)
    for _ in range(1000):
        with pytest.raises(errors.QueueFullError):
            bounds.make_room(waiting, 1, (), done)
    assert 100 <= len(looked) <= 1000


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.7])), max_size=30), st.integers(0, 10), st.integers(2, 4))
def test_a_sweep_drops_what_is_done_and_leaves_the_rest_in_order(entries, deferred_s, divisor):
    swept, left = DeadlineQueue(), DeadlineQueue()
    for q in (swept, left):
        for i, (deadline_s, floor) in enumerate(entries):
            q.push(float(deadline_s), i, floor)
        q.defer(deferred_s)
    swept.sweep(lambda i: i % divisor == 0)
    expected = [i for i in left.drain() if i % divisor]
    assert swept.head_floors(99) == (tuple(entries[i][1] for i in expected) if any(entries[i][1] for i in expected) else ())
    assert swept.drain() == expected


def test_a_batch_with_cancelled_queries_is_filled_up():
    with held() as (s, gate, _):
        futures = s.submit_many(x(range(1, 41)))
        for i, future in enumerate(futures):
            if i % 4:
                future.cancel()
    assert gate.batches == [[0], [1, 5, 9, 13], [17, 21, 25, 29], [33, 37]]


def test_a_batch_of_texts_is_filled_up_with_texts_that_are_no_longer():
    with held(profile=BY_LENGTH, query=tokens(1)) as (s, gate, _):
        futures = s.submit_many([tokens(2)] * 5)
        s.submit_many([tokens(8), tokens(3)])
        for future in futures[1:4]:
            future.cancel()
    assert gate.batches == [[1], [2, 2, 3], [8]]


# -- admission control --------------------------------------------------------------------------------------------------------


def test_with_admission_a_query_that_cannot_be_met_is_refused_at_arrival():
    with held(admission=True, clock=lambda: 0.0) as (s, _, _):
        s.submit_many([x(1)] * 40)  # due in a minute: nobody has to wait for those
        s.submit_many([x(1)] * 8, slo_ms=100.0)  # 8 ms
        with pytest.raises(errors.AdmissionError, match="admission=True"):
            s.submit_many([x(2)] * 84, slo_ms=100.0)
        with pytest.raises(errors.AdmissionError):
            s.submit(x(2), slo_ms=0.5, min_accuracy=0.0)
        assert s.health()["waiting"] == 48
        s.submit_many([x(2)] * 70, slo_ms=100.0)
    with held() as (s, _, _):
        assert s.submit_many([x(2)] * 1000, slo_ms=1.0)


@pytest.mark.parametrize(
    ("lengths", "query", "needs_ms"),
    [
        ([], {}, 1 + 1),
        ([], {"idle": True}, 1),
        ([], {"floor": 0.8}, 1 + 3),
        ([], {"length": 8}, 2 + 2),
        ([], {"length": 0}, 2 + 2),
        ([], {"count": 6}, 6 + 4),
        ([], {"count": 6, "idle": True}, 2 + 4),
        ([1] * 4, {}, 5 + 4),
        ([8] * 4, {}, 9 + 4),
        ([1] * 4, {"length": 8}, 6 + 8),
    ],
)
def test_admission_counts_the_work_before_a_query_and_its_own_batch(lengths, query, needs_ms):
    waiting, fleet = length_queue.make_queue(BY_LENGTH), Fleet([BY_LENGTH])
    for length in lengths:
        waiting.push(0.0, "text", length=length)
    for slack_ms, admitted in (needs_ms / 0.9 + 0.01, True), (needs_ms / 0.9 - 0.01, False):
        control = Admission(BY_LENGTH)
        options = {"length": 1, "shortest_ms": slack_ms, **query}
        assert control.admits(waiting, fleet, 0.0, 1e-3 * slack_ms, **options) == admitted


def test_texts_are_admitted_by_their_length():
    with serve(profile=BY_LENGTH, admission=True, clock=lambda: 0.0) as s:
        with pytest.raises(errors.AdmissionError):
            s.submit_many([tokens(1), tokens(8), tokens(1)], slo_ms=8.5)
        assert len(s.submit_many([tokens(1)] * 3, slo_ms=8.5)) == 3


@settings(deadline=None)
@given(
    due=st.lists(st.floats(0.001, 0.3), max_size=60),
    slo_s=st.floats(0.001, 0.3),
    more_s=st.floats(0.0, 0.1),
    count=st.integers(1, 20),
    floor=st.sampled_from([0.0, 0.72, 0.8]),
    longest=st.integers(1, 8),
)
def test_more_time_never_costs_an_admission_and_more_work_a_higher_floor_or_a_longer_text_never_wins_one(
    due, slo_s, more_s, count, floor, longest
):
    def admits(slo_s=slo_s, count=count, floor=floor, length=longest, workers=2):
        fresh = Admission(BY_LENGTH)
        fleet = Fleet([BY_LENGTH] * workers)
        return fresh.admits(waiting, fleet, 0.0, slo_s, shortest_ms=1e3 * slo_s, count=count, floor=floor, length=length)

    waiting = length_queue.make_queue(BY_LENGTH)
    for i, deadline_s in enumerate(due):
        waiting.push(deadline_s, i, length=1 + i % 8)
    if admits():
        assert all(
            (admits(count=max(count - 1, 1)), admits(floor=0.0), admits(length=1), admits(workers=3), admits(slo_s + more_s))
        )
    else:
        assert not any((admits(count=count + 1), admits(floor=0.8), admits(length=8), admits(workers=1)))


@pytest.mark.parametrize("load", [1.5, 3.0])
def test_in_an_overload_admitted_queries_are_met_and_no_fewer_than_without_admission(load):
    [(admitted, met)] = simulated(load, {36.0: 1}, admission=True)
    [(_, met_without)] = simulated(load, {36.0: 1}, admission=False)
    assert met.sum() > 0.99 * admitted.sum()
    assert met.mean() > met_without.mean() - 0.01


def test_if_nearly_all_can_be_met_nearly_all_are_admitted():
    [(admitted, met)] = simulated(0.8, {36.0: 1}, admission=True)
    assert met.mean() == admitted.mean() > 0.999


# -- fairness -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"expire": True}, {"admission": True}], ids=str)
@pytest.mark.parametrize("load", [1.5, 3.0])
def test_in_an_overload_no_slo_is_served_at_the_expense_of_another(load, options):
    for admitted, met in simulated(load, MIX, **options):
        late = slice(len(met) // 3, -len(met) // 6)  # the beginning is a burst, which long SLOs can wait out; so is the end
        assert met[late].mean() == pytest.approx(1 / load, abs=0.03)
        assert not options.get("admission") or met[late].sum() > 0.97 * admitted[late].sum()


def test_in_a_short_burst_admission_control_lets_long_slos_wait():
    trace = traces.steps(rates_qps=(3 * CAPACITY, 0.3 * CAPACITY, 0.3 * CAPACITY) * 3, step_s=0.06).mixed(slo_ms=MIX)
    result = simulator.simulate(PAPER, "slackfit", trace, cluster=Cluster(admission=True))
    assert (result.outcome[trace.slo_ms == 200.0] == simulator.MET).mean() > 0.99


def test_however_short_an_slo_is_an_overload_keeps_every_worker_busy():
    control, full, fleet = Admission(PAPER), DeadlineQueue(), Fleet([PAPER] * 8)
    full.push_all(0.0, range(1000))
    for ms in range(0, 300, 10):
        assert not control.admits(full, fleet, 1e-3 * ms, 1e-3 * (ms + 9), shortest_ms=9.0)
    one_batch_each = DeadlineQueue()
    one_batch_each.push_all(1.0, range(8 * 16 - 1))
    assert control.admits(one_batch_each, fleet, 0.3, 1.0, shortest_ms=9.0)
    one_batch_each.push(1.0, "one more")
    assert not control.admits(one_batch_each, fleet, 0.3, 1.0, shortest_ms=9.0)
    assert control.admits(one_batch_each, fleet, 0.4, 1.0, shortest_ms=9.0)  # nobody has been refused for a while


def test_a_query_that_could_never_be_met_does_not_count_as_an_overload():
    control, waiting, fleet = Admission(PAPER), DeadlineQueue(), Fleet([PAPER] * 8)
    waiting.push_all(0.2, range(1000))
    for ms in range(500):
        assert not control.admits(waiting, fleet, 1e-3 * ms, 1e-3 * (ms + 1), shortest_ms=1.0)
    assert control.admits(waiting, fleet, 0.5, 0.7, shortest_ms=1.0)
