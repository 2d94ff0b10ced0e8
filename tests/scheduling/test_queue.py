import itertools
import math

import numpy as np
import pytest
from fakes import PROFILE
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import Always

from superserve_jax import errors
from superserve_jax.scheduling import dispatch
from superserve_jax.scheduling.arrivals import ArrivalMeter
from superserve_jax.scheduling.dispatch import Turn
from superserve_jax.scheduling.queue import DeadlineQueue
from superserve_jax.simulation import traces

SMALL, MIDDLE, LARGE = PROFILE.rows
DEADLINES = st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0])
ENTRIES = st.lists(st.tuples(DEADLINES, st.sampled_from([0.0, 0.0, 0.7, 0.8])))


def filled(entries) -> DeadlineQueue:
    q = DeadlineQueue()
    for i, (deadline_s, floor) in enumerate(entries):
        q.push(deadline_s, i, floor)
    return q


def in_order(entries) -> list[int]:
    return sorted(range(len(entries)), key=lambda i: (entries[i][0], i))


@given(ENTRIES)
def test_items_come_out_by_deadline_and_ties_in_order_of_arrival(entries):
    assert filled(entries).drain() == in_order(entries)


@given(ENTRIES, st.integers(0, 8), st.sampled_from([0.0, 0.7, 0.8, math.inf]))
def test_a_pop_takes_the_longest_prefix_that_the_accuracy_allows(entries, n, accuracy):
    q = filled(entries)
    order = in_order(entries)
    expected = []
    for i in order[:n]:
        if entries[i][1] > accuracy:
            break
        expected.append(i)
    assert q.pop(n, accuracy) == expected
    assert len(q) == len(entries) - len(expected)
    assert q.drain() == order[len(expected) :]


@given(ENTRIES, st.integers(0, 8))
def test_head_and_head_floors_describe_the_items_that_pop_takes_next(entries, n):
    q = filled(entries)
    order = in_order(entries)
    assert q.head_deadline_s == (entries[order[0]][0] if order else math.inf)
    assert q.head() == (order[0] if order else None)
    floors = tuple(entries[i][1] for i in order[:n])
    assert q.head_floors(n) == (floors if any(floor for _, floor in entries) else ())


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([0.0, 0.7, 0.8]), st.integers(0, 3))))
def test_push_all_equals_pushing_one_by_one(groups):
    together, one_by_one, item = DeadlineQueue(), DeadlineQueue(), itertools.count()
    for deadline_s, floor, count in groups:
        items = [next(item) for _ in range(count)]
        together.push_all(deadline_s, items, floor)
        for i in items:
            one_by_one.push(deadline_s, i, floor)
    assert (together.pushed, len(together)) == (one_by_one.pushed, len(one_by_one))
    assert together.head_floors(99) == one_by_one.head_floors(99)
    assert together.drain() == one_by_one.drain()
    assert together.head_floors(1) == ()


@given(st.lists(st.one_of(st.floats(0, 10), st.integers(1, 4))))
def test_every_item_comes_out_once_however_pushes_and_pops_interleave(steps):
    q, waiting, pushed, popped = DeadlineQueue(), [], 0, []
    for step in steps:
        if isinstance(step, float):
            q.push(step, pushed)
            waiting.append((step, pushed))
            pushed += 1
        else:
            waiting.sort()
            taken, waiting = waiting[:step], waiting[step:]
            assert q.pop(step) == [item for _, item in taken]
            popped += [item for _, item in taken]
        assert len(q) == len(waiting)
    assert sorted(popped + q.drain()) == list(range(pushed))


@pytest.mark.parametrize(
    "remove",
    [
        lambda q: q.pop(1),
        lambda q: q.pop_before(1.5),
        lambda q: q.pop_above(0.75),
        lambda q: q.sweep(lambda item: item == 0),
        lambda q: (q.defer(1.5), q.drop_late(lambda item: item == 0)),
    ],
    ids=["pop", "pop_before", "pop_above", "sweep", "drop_late"],
)
def test_no_floors_are_reported_once_the_items_that_had_them_are_gone(remove):
    q = filled([(1.0, 0.8), (2.0, 0.0)])
    remove(q)
    assert (q.items(), q.head_floors(2)) == ([1], ())


def test_deferred_items_that_are_done_are_dropped_up_to_the_first_that_is_not():
    q = filled([(1.0, 0.8), (2.0, 0.0), (3.0, 0.7), (4.0, 0.0), (9.0, 0.0)])
    q.defer(5.0)
    q.drop_late(lambda item: item in (0, 1, 3, 4))
    assert (q.late, q.drain(), q.head_floors(9)) == (2, [4, 2, 3], ())


def test_a_batch_is_cut_before_the_first_floor_that_the_subnet_misses():
    q = filled([(1.0, 0.0), (2.0, 0.7), (3.0, 0.75), (4.0, 0.0)])
    assert dispatch.take(q, PROFILE, SMALL, 4, slack_ms=100.0) == (SMALL, [0, 1])


@pytest.mark.parametrize(("slack_ms", "most", "batch"), [(100.0, 4, 4), (100.0, 2, 2), (5.0, 4, 2), (3.0, 4, 1), (1.0, 4, 4)])
def test_a_head_whose_floor_exceeds_the_decided_subnet_runs_on_the_fastest_that_reaches_it(slack_ms, most, batch):
    q = filled([(1.0, 0.75)] * 4)
    assert dispatch.take(q, PROFILE, SMALL, most, slack_ms=slack_ms) == (MIDDLE, list(range(batch)))


def test_the_error_for_a_floor_that_no_subnet_reaches_names_the_best_accuracy():
    with pytest.raises(errors.ProfileError, match=r"as accurate as 0\.9, the best reaches 0\.8; lower the floor"):
        PROFILE.fastest(0.9)


@given(ENTRIES, st.lists(st.sampled_from([1.0, 2.0, 4.0, 6.0]), max_size=3), st.integers(0, 8))
def test_deferred_items_come_last_and_stay_there(entries, times, n):
    q, order = filled(entries), in_order(entries)
    moved = [
        i for k, t in enumerate(times) for i in order if entries[i][0] < t and not any(entries[i][0] < u for u in times[:k])
    ]
    assert sum(q.defer(t) for t in times) == q.late == len(moved)
    expected = [i for i in order if i not in moved] + moved
    assert (q.head(), len(q)) == (expected[0] if expected else None, len(entries))
    assert q.head_floors(n) in ((), tuple(entries[i][1] for i in expected[:n]))
    assert q.pop(n) + q.drain() == expected
    assert (q.late, q.head_floors(3)) == (0, ())


@given(ENTRIES, DEADLINES, DEADLINES)
def test_items_that_were_set_aside_return_to_their_places(entries, late_s, before_s):
    q, untouched = filled(entries), filled(entries)
    assert q.defer(late_s) == untouched.defer(late_s)
    aside = q.set_aside(before_s)
    assert q.head_deadline_s >= before_s or len(q) == q.late
    q.put_back(aside)
    assert q.head_floors(30) == untouched.head_floors(30)
    assert q.drain() == untouched.drain()


@given(ENTRIES, st.sampled_from([0.0, 2.0, 4.0]), st.sampled_from([0.5, 2.5, 9.0]))
def test_due_by_counts_on_time_items_and_pop_before_takes_overdue_ones(entries, deferred_s, time_s):
    q = filled(entries)
    assert q.due_by(time_s) == sum(deadline_s <= time_s for deadline_s, _ in entries)
    q.defer(deferred_s)
    assert q.due_by(time_s) == sum(deferred_s <= deadline_s <= time_s for deadline_s, _ in entries)
    assert sorted(q.pop_before(time_s)) == [i for i, (deadline_s, _) in enumerate(entries) if deadline_s < time_s]
    assert sorted(q.drain()) == [i for i, (deadline_s, _) in enumerate(entries) if deadline_s >= time_s]
    assert q.head_floors(3) == ()


def test_due_by_visits_few_items():
    looked = []

    class Watched(float):
        def __le__(self, other):
            looked.append(self)
            return float(self) <= other

        def __neg__(self):
            looked.append(self)
            return -float(self)

    q = DeadlineQueue()
    q.push(1e6, "the last")
    for i in range(1000):
        q.push(Watched(i), i)
    looked.clear()
    assert q.due_by(499.5) == 500
    assert len(looked) < 20


def test_a_decision_may_defer_items_before_its_batch_is_taken():
    q = filled([(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)])
    turn = Turn(q, ArrivalMeter(), Always(0, 2, defer_ms=2000.0), PROFILE)
    assert dispatch.next_batch(turn, 0.0)[1] == [1, 2]
    assert (q.late, q.drain()) == (1, [0])


@pytest.mark.parametrize("cv2", [0.0, 1.0, 8.0])
def test_the_meter_knows_the_mean_and_the_variance_of_the_arrivals(cv2):
    trace = traces.gamma(rate_qps=2000.0, cv2=cv2, duration_s=40.0)
    meter, readings = ArrivalMeter(), []
    for i, t in enumerate(trace.arrivals_s.tolist()):
        readings.append(meter.read(t, i))
    rate, variance = np.mean(readings[len(readings) // 4 :], axis=0)
    assert rate == pytest.approx(2000.0, rel=0.05)
    assert variance == pytest.approx(2000.0 * cv2, rel=0.2, abs=100.0)


def test_the_meter_forgets_in_a_pause_as_if_it_had_been_read_all_the_time():
    step_s = 2**-5
    asked, alone = ArrivalMeter(window_s=step_s), ArrivalMeter(window_s=step_s)
    for k in range(100):
        assert asked.read(step_s * k, 100 * k) == alone.read(step_s * k, 100 * k)
    for k in range(100, 200):
        asked.read(step_s * k, 9900)
    assert alone.read(step_s * 199, 9900) == pytest.approx(asked.read(step_s * 199, 9900))


def test_the_meter_remembers_the_shortest_slo_for_one_to_two_seconds():
    meter = ArrivalMeter()
    assert meter.slo_ms == math.inf
    meter.shorten(-0.5, 36.0)  # so that the shortest one does not come at the beginning of a period
    meter.shorten(0.0, 18.0)
    seen = []
    for k in range(1, 26):
        meter.shorten(0.1 * k, 36.0)
        seen.append(meter.slo_ms)
    assert seen[:10] == [18.0] * 10
    assert seen[-4:] == [36.0] * 4
