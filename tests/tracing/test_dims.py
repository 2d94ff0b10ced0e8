"""Symbolic lengths: what is unified, how leaves are refined, and what is fixed instead."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.tracing.dims import Dim, cut, fix, leaves, product, resolve, total, unify

HERE = "model.py:1"


def sizes(dim):
    return [leaf.size for leaf in leaves(dim)]


def same(a, b):
    return all(x is y for x, y in zip(leaves(a), leaves(b), strict=True))


def fixed(*dims):
    return all(leaf.fixed for dim in dims for leaf in leaves(dim))


def test_unified_leaves_are_one():
    a, b, c = Dim(4), Dim(4), Dim(4)
    unify(a, b, HERE)
    unify(b, c, HERE)
    assert resolve(a) is resolve(b) is resolve(c)


def test_the_size_of_a_kernel_keeps_its_steps_when_it_meets_an_axis():
    for of_kernel, other in ((Dim(7, steps=(3, 5, 7)), Dim(7)), (Dim(5, steps=(3, 5)), Dim(5, fixed="a reason"))):
        for first, second in ((of_kernel, other), (other, of_kernel)):
            unify(first, second, HERE)
            assert resolve(first) is resolve(second) is of_kernel
        assert of_kernel.fixed == other.fixed


def test_axes_of_length_one_stay_apart():
    a, b = Dim(1), Dim(1)
    unify(a, b, HERE)
    assert resolve(a) is not resolve(b)


def test_a_fixed_axis_fixes_what_it_meets():
    a, b = Dim(12), product([Dim(3), Dim(4)])
    fix(a, "the first reason")
    unify(a, b, HERE)
    fix(b, "the second reason")
    assert [leaf.fixed for leaf in leaves(b)] == ["the first reason"] * 2


def test_the_parts_of_fixed_axes_are_not_compared():
    a, b = total([Dim(1), Dim(4_999)]), total([Dim(4_999), Dim(1)])
    fix(a, "tokens")
    unify(a, b, HERE)
    assert fixed(a, b)
    assert resolve(a) is resolve(b)
    assert len(leaves(a)) == 2


def test_an_axis_in_too_many_parts_is_fixed():
    """A channel axis that is shifted by one entry and added to itself."""
    axis = Dim(5_000)
    rest, last = cut(axis, 0, 4_999, HERE), cut(axis, 4_999, 5_000, HERE)
    unify(axis, total([last, rest]), HERE)
    assert fixed(axis)
    assert len(leaves(axis)) < 100


def test_products_refine_each_other():
    a, b, c = Dim(8), Dim(2), Dim(16)
    unify(product([a, c]), product([b, Dim(4), Dim(16)]), HERE)
    assert sizes(a) == [2, 4]
    assert same(product([a, c]), product([b, *leaves(a)[1:], c]))


def test_sums_refine_each_other():
    a, b = total([Dim(4), Dim(6)]), total([Dim(3), Dim(7)])
    unify(a, b, HERE)
    assert sizes(a) == [3, 1, 6]
    assert same(a, b)
    assert not fixed(a)


def test_a_part_that_is_a_product_meets_several_parts():
    heads, features = Dim(2), Dim(3)
    merged = product([heads, features])
    left, right = total([Dim(3), Dim(3), Dim(5)]), total([merged, Dim(5)])
    unify(left, right, HERE)
    assert same(left, right)
    assert not any(leaf.fixed for leaf in leaves(left))


def test_equal_blocks_one_after_another_are_a_product():
    """(3, columns) and query, key and value one after another."""
    three, columns = Dim(3), Dim(8)
    q, k, v = Dim(8), Dim(8), Dim(8)
    unify(product([three, columns]), total([q, k, v]), HERE)
    assert resolve(q) is resolve(k) is resolve(v) is resolve(columns)
    assert sizes(three) == [1, 1, 1]


def test_a_sum_of_heads_distributes_over_their_features():
    """(p + q) * r is p * r + q * r."""
    p, q, r = Dim(2), Dim(3), Dim(4)
    first, second = Dim(8), Dim(12)
    unify(product([total([p, q]), r]), total([first, second]), HERE)
    assert same(first, product([p, r]))
    assert same(second, product([q, r]))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda: product([Dim(2), Dim(3)]), lambda: product([Dim(3), Dim(2)])),
        (lambda: product([Dim(4), Dim(4)]), lambda: total([Dim(3), Dim(13)])),
        (lambda: total([product([Dim(2), Dim(4)]), Dim(2)]), lambda: total([Dim(3), Dim(7)])),
    ],
)
def test_structures_that_do_not_fit_are_fixed(a, b):
    a, b = a(), b()
    unify(a, b, HERE)
    assert fixed(a, b)
    assert HERE in leaves(a)[0].fixed


def test_axes_of_two_sizes_are_an_error():
    with pytest.raises(AssertionError, match="3 and 4 entries"):
        unify(Dim(3), Dim(4), HERE)


def test_a_merged_axis_is_cut_between_its_blocks():
    heads, features = Dim(4), Dim(3)
    first = cut(product([heads, features]), 3, 9, HERE)
    assert first.size == 6
    assert sizes(heads) == [1, 2, 1]
    assert same(first, product([leaves(heads)[1], features]))


def test_a_merged_axis_that_is_cut_inside_a_block_is_fixed():
    axis = product([Dim(4), Dim(3)])
    assert fixed(cut(axis, 0, 4, HERE), axis)


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=4), st.data())
def test_two_ways_to_merge_the_same_axes_agree(shape, data):
    """Any two row-major divisions of one axis are the same axis, or fixed. No entry is lost."""
    size = math.prod(shape)
    other = []
    while (rest := size // math.prod(other)) > 1:
        other.append(data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
    a, b = product([Dim(n) for n in shape]), product([Dim(n) for n in other])
    unify(a, b, HERE)
    assert math.prod(sizes(a)) == math.prod(sizes(b)) == size
    assert same(a, b) or fixed(a, b)
