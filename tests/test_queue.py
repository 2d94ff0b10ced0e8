import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax import errors
from superserve_jax.profile import Profile, Row
from superserve_jax.serving import queue
from superserve_jax.subnet import Subnet

SMALL, MIDDLE, LARGE = (
    Row(Subnet((i,)), accuracy, tuple(ms * (i + 1) for ms in (1.0, 2.0, 4.0))) for i, accuracy in enumerate((0.7, 0.75, 0.8))
)
PROFILE = Profile((1, 2, 4), (SMALL, MIDDLE, LARGE))
ENTRIES = st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0]), st.sampled_from([0.0, 0.0, 0.7, 0.8])))


def filled(entries) -> queue.DeadlineQueue:
    q = queue.DeadlineQueue()
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
def test_the_head_is_what_the_next_pops_take(entries, n):
    q = filled(entries)
    order = in_order(entries)
    assert q.head_deadline_s == (entries[order[0]][0] if order else math.inf)
    assert q.head() == (order[0] if order else None)
    floors = tuple(entries[i][1] for i in order[:n])
    assert q.head_floors(n) == (floors if any(floor for _, floor in entries) else ())


@given(st.lists(st.one_of(st.floats(0, 10), st.integers(1, 4))))
def test_every_item_comes_out_once_however_pushes_and_pops_interleave(steps):
    q, waiting, pushed, popped = queue.DeadlineQueue(), [], 0, []
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


def test_no_floors_are_reported_once_the_items_that_had_them_are_gone():
    q = filled([(1.0, 0.8), (2.0, 0.0)])
    q.pop(1)
    assert q.head_floors(2) == ()


def test_a_batch_is_cut_before_the_first_floor_that_the_subnet_misses():
    q = filled([(1.0, 0.0), (2.0, 0.7), (3.0, 0.75), (4.0, 0.0)])
    assert queue.take(q, PROFILE, SMALL, 4, slack_ms=100.0) == (SMALL, [0, 1])


@pytest.mark.parametrize(
    ("slack_ms", "batch"), [(100.0, 4), (5.0, 2), (3.0, 1), (1.0, 4)], ids=["all", "cut", "one", "hopeless"]
)
def test_a_head_above_the_decided_subnet_is_taken_by_the_fastest_that_reaches_it(slack_ms, batch):
    q = filled([(1.0, 0.75)] * 4)
    assert queue.take(q, PROFILE, SMALL, 4, slack_ms=slack_ms) == (MIDDLE, list(range(batch)))


def test_a_floor_that_no_subnet_reaches_names_the_best():
    with pytest.raises(errors.ProfileError, match=r"as accurate as 0\.9, the best reaches 0\.8; lower the floor"):
        queue.fastest(PROFILE, 0.9)
