"""Rules of broadcast, transpose, reshape, squeeze, stack and tile."""

import jax.numpy as jnp
import pytest
from tracing_cases import SHAPES, X
from tracing_checks import check_axes, check_cases, random_params, reasons

from superserve_jax import tracing


@pytest.mark.parametrize("name", SHAPES)
def test_a_primitive_tells_which_axes_can_change(name):
    check_axes(name)


def test_results_and_gradients_are_those_of_small_parameters():
    check_cases(SHAPES)


def test_the_shortest_runs_of_axes_with_equal_numbers_of_entries_are_merged():
    """(6, 4, 5) to (3, 2, 20): the first axis is divided, the others are merged."""
    traced = tracing.trace(
        lambda p, x: jnp.einsum("abc,abcx->x", p["a"].reshape(3, 2, 20), p["b"]),
        random_params({"a": (6, 4, 5), "b": (3, 2, 20, 7)}),
        X,
    )
    cuts = {name: {str(place) for place in group.places} for name, group in traced.groups.items()}
    assert cuts == {"b[0]": {"a[0]", "b[0]"}, "b[1]": {"a[0]", "b[1]"}, "a[1]": {"a[1]", "b[2]"}, "a[2]": {"a[2]", "b[2]"}}


def test_two_divisions_of_one_axis_that_do_not_fit_fix_it():
    found = reasons(lambda p, x: jnp.sum(p["a"].reshape(2, 3)) + jnp.sum(jnp.exp(p["a"].reshape(3, 2))), {"a": (6,)})
    assert found == {"a[0]": "one axis is divided in two ways that do not fit, at test_shapes.py"}


def test_a_stack_numbers_its_arrays():
    found = reasons(lambda p, x: jnp.einsum("nij,njk->ik", jnp.stack([x @ p["a"]] * 3), p["b"]), {"a": (6, 4), "b": (3, 4, 2)})
    assert found["b[0]"] == "stack at test_shapes.py"
