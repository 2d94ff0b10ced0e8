"""Limits, active sizes, masks and cuts of axes with structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve_jax.tracing.dims import Dim, product, total
from superserve_jax.tracing.sizes import Sizes


def structure():
    """An axis ((a * b) + c) * d, and its leaves."""
    a, b, c, d = Dim(2), Dim(3), Dim(4), Dim(2)
    return product([total([product([a, b]), c]), d]), (a, b, c, d)


def kept(sizes):
    """By hand: the entries that remain of the axis of `structure`."""
    a, b, c, d = sizes
    rows = [i * 3 + j for i in range(a) for j in range(b)] + [6 + k for k in range(c)]
    return [row * 2 + column for row in rows for column in range(d)]


some = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2))


@given(some)
def test_a_cut_keeps_the_first_entries_of_every_leaf(chosen):
    axis, names = structure()
    sizes = Sizes(dict(zip(names, chosen, strict=True)))
    x = np.arange(2 * 20).reshape(2, 20)
    np.testing.assert_array_equal(sizes.cut(jnp.asarray(x), [Dim(2), axis]), x[:, kept(chosen)])
    assert sizes.limit(axis) == sizes.active(axis) == len(kept(chosen))


@given(some)
def test_a_mask_marks_the_entries_of_the_cut(chosen):
    axis, names = structure()
    sizes = Sizes({leaf: (leaf.size, jnp.int32(n)) for leaf, n in zip(names, chosen, strict=True)})
    np.testing.assert_array_equal(np.flatnonzero(sizes.mask(axis)), kept(chosen))
    assert sizes.limit(axis) == 20
    assert int(sizes.active(axis)) == len(kept(chosen))


@given(some)
def test_a_part_begins_behind_what_remains_before_it(chosen):
    axis, names = structure()
    sizes = Sizes(dict(zip(names, chosen, strict=True)))
    a, b, c, d = chosen
    assert [sizes.position(axis, start) for start in (0, 12, 20)] == [0, a * b * d, (a * b + c) * d]


@pytest.mark.parametrize(
    ("chosen", "one_slice"), [((2, 3, 2, 2), True), ((1, 3, 4, 2), False), ((2, 3, 4, 1), False), ((2, 3, 4, 2), True)]
)
def test_first_entries_are_cut_by_one_slice(chosen, one_slice):
    """A server keeps such a slice of the weights without a copy."""
    axis, names = structure()
    sizes = Sizes(dict(zip(names, chosen, strict=True)))
    assert (kept(chosen) == [*range(len(kept(chosen)))]) == one_slice
    names = {equation.primitive.name for equation in jax.make_jaxpr(lambda x: sizes.cut(x, [axis]))(jnp.arange(20)).eqns}
    assert (names <= {"slice"}) == one_slice
