"""Rules of functions of single entries."""

import jax.numpy as jnp
import pytest
from tracing_cases import ONE, X, single_entries
from tracing_checks import check, primitives, random_params, reasons

from superserve_jax import tracing

SHAPES = {"a": (6, 8), "b": (8, 3), "c": (6, 8), "d": (8,)}


def test_each_function_is_its_primitive():
    assert {*ONE} <= primitives(single_entries, random_params(SHAPES), X)


def test_all_axes_stay_the_same_and_gradients_are_finite():
    traced = check(single_entries, random_params(SHAPES), X)
    assert {*traced.groups} == {"a[1]"}


def test_an_axis_of_length_one_is_repeated():
    traced = tracing.trace(
        lambda p, x: (x @ p["a"] * p["g"]) @ p["b"], random_params({"a": (6, 8), "g": (1, 8), "b": (8, 2)}), X
    )
    assert [str(place) for place in traced.groups["a[1]"].places] == ["a[1]", "b[0]", "g[1]"]


@pytest.mark.parametrize("numbers", [jnp.zeros((1, 8)), jnp.full((4, 8), 2.5)])
def test_an_array_of_equal_numbers_may_be_cut(numbers):
    traced = check(
        lambda p, x: (x @ p["a"] + numbers[:, : p["a"].shape[1]]) @ p["b"], random_params({"a": (6, 8), "b": (8, 2)}), X
    )
    assert "a[1]" in traced.groups


def test_an_array_of_other_numbers_fixes_its_axes():
    numbers = jnp.linspace(0, 1, 8)
    found = reasons(lambda p, x: (x @ p["a"] + numbers) @ p["b"], {"a": (6, 8), "b": (8, 2)})
    assert found["a[1]"] == "an array of shape (8,) that the function makes without its parameters"


def test_an_infinite_number_of_the_code_stays_out_of_what_is_beyond_the_active_size():
    """The largest of some numbers is -inf if all of them are left out. Beyond the active size, all are, because they are 0."""

    def function(p, x):
        h = abs(x @ p["a"])
        lowest = jnp.full((4, 8), -jnp.inf)[:, : h.shape[1]]
        return jnp.where(h > 0.001, h, lowest).max(0) @ p["b"], jnp.where(h > 0.001, h, -jnp.inf).max(0) @ p["b"]

    check(function, random_params({"a": (6, 8), "b": (8, 2)}), X)
