"""Every rule has a case, and primitives without a rule keep all sizes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tracing_cases import CASES, ONE, X
from tracing_checks import check, random_params, reasons

from superserve_jax import tracing
from superserve_jax.tracing.rules import RULES

# Names of the same primitives in some versions of jax, and primitives of which jax traces no example.
OTHER_NAMES = {
    "checkpoint",
    "remat",
    "custom_vjp_call_jaxpr",
    "copy_p",
    "threefry2x32",
    "add_any",
    "reduce_window",
    "unstack",
    "kernel_select",  # test_selections.py
}


def test_every_rule_has_a_case():
    assert {*RULES} - OTHER_NAMES == {name.split(":")[0] for name in (*CASES, *ONE)} - {"jit"}


def test_an_unknown_primitive_fixes_its_axes():
    found = reasons(lambda p, x: jnp.linalg.cholesky(p["a"] @ p["a"].T + 9 * jnp.eye(6)) @ p["b"], {"a": (6, 8), "b": (6, 2)})
    assert found["b[0]"] == "cholesky at test_base.py"


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda h: lax.while_loop(lambda h: h.sum() < 0, lambda h: h + 1, h), "while"),
        (lambda h: lax.linalg.tridiagonal_solve(h[0], h[0], h[0], h.T).T, "tridiagonal_solve"),
    ],
)
def test_the_reason_names_the_primitive_and_the_line(op, name):
    found = reasons(lambda p, x: op(x @ p["a"]) @ p["b"], {"a": (6, 8), "b": (8, 2)})
    assert found["a[1]"] == found["b[0]"] == f"{name} at test_base.py"


def test_what_is_fixed_does_not_fix_the_rest():
    function = lambda p, x: jnp.sort(x @ p["a"]) @ p["b"] @ p["c"]  # noqa: E731
    traced = check(function, random_params({"a": (6, 8), "b": (8, 5), "c": (5, 2)}), X)
    assert {*traced.groups} == {"b[1]"}


def test_the_same_jitted_function_does_not_connect_its_callers():
    double = jax.jit(lambda h: 2 * h)
    traced = tracing.trace(
        lambda p, x: double(double(x @ p["a"]) @ p["b"]) @ p["c"], random_params({"a": (6, 8), "b": (8, 8), "c": (8, 2)}), X
    )
    assert {*traced.groups} == {"a[1]", "b[1]"}
