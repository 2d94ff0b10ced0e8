"""Rules of sums, maxima and others along an axis."""

import jax.numpy as jnp
import pytest
from tracing_cases import REDUCTIONS
from tracing_checks import check_axes, check_cases, reasons


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_primitive_tells_which_axes_can_change(name):
    check_axes(name)


def test_results_and_gradients_are_those_of_small_parameters():
    check_cases(REDUCTIONS)


def test_what_depends_on_the_order_of_an_axis_fixes_it():
    for op in (jnp.cumsum, jnp.sort, jnp.argsort):
        found = reasons(lambda p, x, op=op: (x @ p["a"] + op(x @ p["a"], 1)) @ p["b"], {"a": (6, 8), "b": (8, 2)})
        assert found["a[1]"] == f"{op.__name__.removeprefix('arg')} at test_reductions.py"
