"""The divisor of a mean follows the sizes. Other numbers that may come from a size are reported."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tracing_cases import X
from tracing_checks import check, random_params

from superserve_jax import tracing

SHAPES = {"a": (6, 8), "b": (8, 3)}


def hidden(op):
    return lambda p, x: op(x @ p["a"]) @ p["b"]


MEANS = {
    "mean": lambda h: h - h.mean(1, keepdims=True),
    "var": lambda h: h * h.var(1, keepdims=True),
    "std": lambda h: h / (1 + h.std(1, keepdims=True)),
    "sum divided by the size": lambda h: h - h.sum(1, keepdims=True) / h.shape[1],
    "sum times one over the size": lambda h: h - (1 / h.shape[1]) * h.sum(1)[:, None],
    "over all axes": lambda h: h - h.mean(),
    "sum of sums": lambda h: h - h.sum(0).sum(0) / h.size,
    "mean of means": lambda h: h - h.mean(0).mean(0),
    "of merged axes": lambda h: h - h.reshape(-1).mean(),
    "in float16": lambda h: h - h.astype(jnp.float16).mean(1, keepdims=True).astype(jnp.float32) * 0,
    "jax.nn.standardize": lambda h: jax.nn.standardize(h, axis=1, epsilon=0.01),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_divides_by_the_number_of_entries_that_count(name):
    traced = check(hidden(MEANS[name]), random_params(SHAPES), X)
    assert {*traced.groups} == {"a[1]"}
    assert not traced.suspects


# {name: (operation, number, form)}
SUSPECTS = {
    "scale": (lambda h: h * h.shape[1] ** -0.5, 8**-0.5, "n ** -0.5"),
    "square root": (lambda h: h * h.shape[1] ** 0.5, 8**0.5, "n ** 0.5"),
    "fourth root": (lambda h: h * h.shape[1] ** -0.25, 8**-0.25, "n ** -0.25"),
    "logarithm": (lambda h: h / math.log(h.shape[1]), math.log(8), "log(n)"),
    "constant": (lambda h: h / 8, 8, "n"),
    "array of one number": (lambda h: h * np.full(h.shape[1], 1 / h.shape[1], np.float32), 1 / 8, "1 / n"),
    "computed in jax": (lambda h: h / jnp.sqrt(jnp.float32(h.shape[1])), 8**0.5, "n ** 0.5"),
    "sample variance": (lambda h: h * h.var(1, keepdims=True, ddof=1), 7, "n - 1"),
    "ones": (lambda h: h / jnp.ones_like(h).sum(1, keepdims=True), 8, "n"),
    "arange": (lambda h: h / (1 + jnp.arange(h.shape[1])).max(), 8, "n"),
}


@pytest.mark.parametrize("name", SUSPECTS)
def test_a_number_that_may_come_from_a_size_is_reported(name):
    op, number, form = SUSPECTS[name]
    traced = tracing.trace(hidden(op), random_params(SHAPES), X)
    (suspect,) = traced.suspects
    assert suspect.number == pytest.approx(number)
    assert (suspect.form, suspect.size, suspect.groups) == (form, 8, ("a[1]",))
    assert suspect.where.startswith("test_means.py:")
    assert str(suspect).endswith(f"may be {form} of n = 8, the size of a[1]. It stays the same at other sizes")


def test_a_size_of_two_merged_groups_is_reported():
    def function(p, x):
        h = (x @ p["a"].reshape(6, -1)) * 12**-0.5
        return h @ p["b"].reshape(-1, 2)

    traced = tracing.trace(function, random_params({"a": (6, 3, 4), "b": (3, 4, 2)}), X)
    assert [suspect.groups for suspect in traced.suspects] == [("a[1]", "a[2]")]


def test_other_numbers_are_not_reported():
    assert not tracing.trace(hidden(lambda h: jax.nn.gelu(h) * 3 + 0.3), random_params(SHAPES), X).suspects


def test_numbers_of_activations_are_not_reported():
    """GELU has the number 0.5, which is 4 ** -0.5."""
    shapes = {"a": (6, 4), "b": (4, 2)}
    assert not tracing.trace(hidden(lambda h: jax.nn.gelu(nnx.silu(h), approximate=False)), random_params(shapes), X).suspects
    assert tracing.trace(hidden(lambda h: 0.5 * jax.nn.gelu(h)), random_params(shapes), X).suspects


def test_spatial_axes_as_long_as_an_axis_of_channels_are_not_reported():
    def function(p, x):
        images = jnp.broadcast_to(x[:, None, :, None], (len(x), 6, 6, 1))
        h = jax.lax.conv_general_dilated(images, p["a"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return h.sum((1, 2)) @ p["b"]

    traced = tracing.trace(function, random_params({"a": (3, 3, 1, 4), "b": (4, 2)}), X)  # the images become 4 x 4
    assert [group.size for group in traced.groups.values()] == [4]
    assert not traced.suspects
