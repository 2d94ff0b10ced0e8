"""Rules of scan, checkpoint, and functions with derivatives of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing_cases import CALLS, X
from tracing_checks import check_axes, check_cases, primitives, random_params, reasons

from superserve_jax import tracing


@pytest.mark.parametrize("name", CALLS)
def test_a_primitive_tells_which_axes_can_change(name):
    check_axes(name)


def test_results_and_gradients_are_those_of_small_parameters():
    check_cases(CALLS)


def test_the_axis_of_a_scan_is_fixed():
    traced = check_axes("scan")
    assert {str(fixed.place) for fixed in traced.fixed if fixed.reason.startswith("the axis of a scan")} == {"w[0]", "d[0]"}


def test_relu_keeps_its_derivative_at_zero():
    params = {"a": jnp.zeros((6, 8)), "b": jnp.ones((8, 3))}
    traced = tracing.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, X)
    gradient = jax.grad(lambda p: traced.evaluate(p, X, {"a[1]": (8, jnp.int32(4))}).sum())(params)["a"]
    np.testing.assert_array_equal(gradient, 0)


def test_a_checkpoint_still_saves_memory():
    traced = tracing.trace(CALLS["remat2"].function, params := random_params(CALLS["remat2"].shapes), X)
    assert "remat2" in primitives(lambda p: traced.evaluate(p, X, {"a[1]": 4}), params)


def test_a_derivative_that_numbers_an_axis_fixes_it():
    @jax.custom_jvp
    def plain(h):
        return jnp.tanh(h)

    @plain.defjvp
    def _(primals, tangents):
        return plain(*primals), tangents[0] * jnp.arange(8.0)

    found = reasons(lambda p, x: plain(x @ p["a"]) @ p["b"], {"a": (6, 8), "b": (8, 2)})
    assert found["a[1]"].startswith("an axis is numbered")
