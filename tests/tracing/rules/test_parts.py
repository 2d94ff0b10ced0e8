"""Rules of concatenate, split, slice, pad, dynamic_slice and rev."""

import jax.numpy as jnp
import pytest
from tracing_cases import PARTS, X
from tracing_checks import check_axes, check_cases, random_params, reasons

from superserve_jax import tracing


@pytest.mark.parametrize("name", PARTS)
def test_a_primitive_tells_which_axes_can_change(name):
    check_axes(name)


def test_results_and_gradients_are_those_of_small_parameters():
    check_cases(PARTS)


def test_a_part_that_is_cut_has_a_size_of_its_own():
    traced = tracing.trace(
        lambda p, x: (x @ p["a"])[:, 2:5] @ p["b"] + jnp.tanh(x @ p["a"]).sum(), random_params({"a": (6, 8), "b": (3, 2)}), X
    )
    assert {name: group.size for name, group in traced.groups.items()} == {"a[1].0": 2, "b[0]": 3, "a[1].2": 3}


def test_reasons_name_the_operation_and_the_line():
    assert reasons(lambda p, x: x @ p["a"][:, ::-1] @ p["b"], {"a": (6, 8), "b": (8, 2)})["a[1]"] == (
        "an axis is reversed at test_parts.py"
    )
    assert reasons(lambda p, x: x @ p["a"][:, ::2] @ p["b"], {"a": (6, 8), "b": (4, 2)})["b[0]"] == (
        "a slice with a step at test_parts.py"
    )


def test_a_cut_inside_of_a_merged_axis_fixes_it():
    found = reasons(
        lambda p, x: p["a"].reshape(-1)[:6] @ p["b"] + jnp.einsum("ij,i,j->", p["a"], p["c"], p["d"]),
        {"a": (3, 4), "b": (6, 2), "c": (3,), "d": (4,)},
    )
    assert found["a[0]"] == found["a[1]"] == "a merged axis is cut inside of a block, at test_parts.py"


def test_an_axis_in_single_entries_keeps_its_size_with_a_reason():
    found = reasons(lambda p, x: (x @ p["a"] + jnp.roll(x @ p["a"], 1, 1)) @ p["b"], {"a": (6, 8), "b": (8, 2)})
    assert found["a[1]"] == found["b[0]"] == "its entries are used one by one"
