"""Rules of look-ups in tables, of axes that are numbered, and of random numbers."""

import jax
import jax.numpy as jnp
import pytest
from tracing_cases import LOOKUPS
from tracing_checks import check_axes, check_cases, reasons


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_primitive_tells_which_axes_can_change(name):
    check_axes(name)


def test_results_and_gradients_are_those_of_small_parameters():
    check_cases(LOOKUPS)


def test_the_rows_of_a_table_are_fixed():
    found = reasons(lambda p, x: p["a"][jnp.argmax(x, 1)] @ p["b"], {"a": (7, 8), "b": (8, 2)})
    assert found["a[0]"] == "a look-up at test_lookups.py"


def test_dropout_fixes_the_axes_and_says_what_to_do():
    found = reasons(
        lambda p, x: (x @ p["a"] * jax.random.bernoulli(jax.random.key(0), 0.5, (4, 8))) @ p["b"], {"a": (6, 8), "b": (8, 2)}
    )
    assert found["a[1]"] == (
        "random numbers of this shape (for dropout, trace with a rate of 0 or deterministic=True) at test_lookups.py"
    )


def test_positions_are_numbered():
    found = reasons(lambda p, x: x @ p["a"] @ (jnp.sin(jnp.arange(8.0))[:, None] * p["b"]), {"a": (6, 8), "b": (8, 2)})
    assert found["a[1]"].startswith("an axis is numbered")
