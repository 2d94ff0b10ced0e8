import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from superserve_jax import errors
from superserve_jax.engines import subnet_buckets
from superserve_jax.subnet import envelope_of

SPACE = list(TINY.space().enumerate())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(SPACE), min_size=1, max_size=25, unique=True), st.integers(1, 8))
def test_every_subnet_has_a_subnet_bucket_that_covers_it_and_at_most_count_are_chosen(chosen, count):
    bucket_of = subnet_buckets.choose(chosen, TINY.flops, count)
    assert set(bucket_of) == set(chosen)
    assert len(set(bucket_of.values())) <= count
    for top in set(bucket_of.values()):
        assert top == envelope_of([s for s, t in bucket_of.items() if t == top])
    assert subnet_buckets.extra(bucket_of, TINY.flops) >= 0


def test_more_subnet_buckets_cost_less_and_enough_cost_nothing():
    chosen = SPACE[::6]
    extras = [subnet_buckets.extra(subnet_buckets.choose(chosen, TINY.flops, n), TINY.flops) for n in (1, 2, 4, len(chosen))]
    assert extras == sorted(extras, reverse=True)
    assert extras[-1] == 0 < extras[-2] < extras[0]


def test_the_choice_beats_subnet_buckets_of_neighbours_in_flops():
    chosen = sorted(SPACE[::3], key=TINY.flops)
    size = -(-len(chosen) // 8)
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    neighbours = {s: envelope_of(group) for group in groups for s in group}
    ours = subnet_buckets.choose(chosen, TINY.flops, 8)
    assert subnet_buckets.extra(ours, TINY.flops) < 0.7 * subnet_buckets.extra(neighbours, TINY.flops)


def test_fewer_than_one_subnet_bucket_is_refused():
    with pytest.raises(errors.ConfigError, match="at least 1, got 0"):
        subnet_buckets.choose(SPACE[:2], TINY.flops, 0)
