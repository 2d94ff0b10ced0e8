"""`kernel_select` at other sizes is the convolution with the small kernel, computed by hand."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tracing_checks import FAST, random_params

from superserve_jax import errors, ops, tracing
from superserve_jax.tracing.kernels import kernel_select

SHAPES = {"a": (2, 6), "w": (7, 7, 1, 6), "to5": (25, 25), "to3": (9, 9), "b": (6, 3), "more": (7, 7, 1, 6)}
DIVIDED = {"w9": (9, 9, 1, 6), "parts": (3, 3, 9, 1, 6)}
IMAGES = np.random.default_rng(3).normal(size=(2, 9, 8, 2)).astype(np.float32)
SIZES = (3, 5, 7)


def depthwise(x, kernel, padding, stride=1, dilation=1):
    numbers, groups = ("NHWC", "HWIO", "NHWC"), kernel.shape[-1]
    strides, steps = (stride, stride), (dilation, dilation)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=steps, dimension_numbers=numbers, feature_group_count=groups
    )


def select(p):
    return kernel_select(p["w"], {5: p["to5"], 3: p["to3"]})


def function(p, x, padding=((3, 3), (3, 3)), **how):
    return jnp.tanh(depthwise(jnp.tanh(x @ p["a"]), select(p), padding, **how)).mean((1, 2)) @ p["b"]


def by_hand(p, x, k, channels, padding=((3, 3), (3, 3)), **how):
    """The small network. Its kernel is made by matrix products, one kernel of one channel after another."""
    kernels = []
    for c in range(channels):
        kernel = p["w"][:, :, 0, c]
        for size in (5, 3):
            if size >= k:
                kernel = (p[f"to{size}"] @ kernel[1:-1, 1:-1].ravel()).reshape(size, size)
        kernels.append(kernel)
    less = (7 - k) // 2 * how.get("dilation", 1)
    smaller = [(low - less, high - less) for low, high in padding]
    h = depthwise(jnp.tanh(x @ p["a"][:, :channels]), jnp.stack(kernels, -1)[:, :, None], smaller, **how)
    return jnp.tanh(h).mean((1, 2)) @ p["b"][:channels]


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def value_and_gradients(run, params):
    def loss(p):
        result = run(p)
        return jnp.sum(result * jnp.cos(jnp.arange(result.size)).reshape(result.shape)), result

    gradients, result = jax.grad(loss, has_aux=True)(params)
    return {"result": result, **gradients}


def assert_equal(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("padding", "how"),
    [(((3, 3), (3, 3)), {}), (((2, 3), (3, 2)), {"stride": 2}), (((6, 7), (6, 6)), {"dilation": 2})],
    ids=["whole", "stride", "dilation"],
)
def test_results_and_gradients_are_those_of_the_small_kernel(padding, how):
    run, params = functools.partial(function, padding=padding, **how), random_params(SHAPES)
    traced = tracing.trace(run, params, IMAGES)
    assert traced.groups["w"].steps == SIZES
    for k, channels in ((3, 4), (5, 6), (7, 4)):
        expected = value_and_gradients(lambda p, k=k, c=channels: by_hand(p, IMAGES, k, c, padding, **how), params)
        assert (k == 7) == (not np.any(expected["to5"]))
        for limit in sorted({k, 5, 7} - set(range(k))):
            sizes = {"a[1]": (6, jnp.int32(channels)), "w": (limit, jnp.int32(k))}
            found = value_and_gradients(lambda p, s=sizes: traced.evaluate(p, IMAGES, s), params)
            assert_equal(found, expected)
        found = value_and_gradients(lambda p, s={"a[1]": channels, "w": k}: traced.evaluate(p, IMAGES, s), params)
        assert_equal(found, expected)


def test_a_kernel_that_was_made_smaller_before_is_accepted():
    params = random_params(SHAPES)
    traced = tracing.trace(function, params, IMAGES)
    small = ops.kernel_select(params["w"], {5: params["to5"], 3: params["to3"]}, 3)
    found = traced.evaluate({**params, "w": small}, IMAGES, {"w": 3})
    np.testing.assert_array_equal(found, traced.evaluate(params, IMAGES, {"w": 3}))


def test_only_the_given_sizes_are_possible():
    traced = tracing.trace(function, random_params(SHAPES), IMAGES)
    with pytest.raises(errors.ConfigError, match=r"kernel 'w' is 4; it can be one of \(3, 5, 7\)"):
        traced.sizes({"w": 4})


def test_without_matrices_a_small_kernel_is_the_centre():
    params = random_params({"w": (5, 2, 3)})
    assert ops.kernel_select(params["w"], {3: None}, 3).tolist() == params["w"][1:4].tolist()

    def convolve(p, x):
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, kernel_select(p["w"], {3: None}), (1,), ((2, 2),), dimension_numbers=numbers)

    x = IMAGES[:, 0]
    expected = lax.conv_general_dilated(x, params["w"][1:4], (1,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC"))
    traced = tracing.trace(convolve, params, x)
    np.testing.assert_allclose(traced.evaluate(params, x, {"w": (5, jnp.int32(3))}), expected, atol=1e-6)


def test_outside_of_a_trace_it_returns_the_kernel():
    params = random_params(SHAPES)
    np.testing.assert_array_equal(jax.jit(select)(params), params["w"])
    gradients = jax.grad(lambda p: jnp.sum(jnp.square(select(p))))(params)
    np.testing.assert_allclose(gradients["w"], 2 * params["w"])
    assert not np.any(gradients["to5"])
    twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    np.testing.assert_array_equal(jax.vmap(select)(twice), twice["w"])
    np.testing.assert_array_equal(jax.jvp(select, (params,), (params,))[1], params["w"])


PADDED = ((3, 3), (3, 3))
FIXED = {
    "too little padding": (lambda p, x: depthwise(x @ p["a"], select(p), ((1, 1), (3, 3))), "a padding that is too small"),
    "computed": (
        lambda p, x: depthwise(x @ p["a"], kernel_select(p["w"] * 2, {3: p["to3"]}), PADDED),
        "the kernel or a matrix is no parameter there",
    ),
    "read twice": (
        lambda p, x: depthwise(x @ p["a"], select(p), PADDED) + p["w"].sum((0, 1, 2)),
        "the kernel is used more than once",
    ),
    "summed": (
        lambda p, x: depthwise(x @ p["a"], select(p) - select(p).mean(), PADDED),
        "the kernel is used more than once",
    ),
    "added to": (
        lambda p, x: depthwise(x @ p["a"], select(p) + p["more"], PADDED),
        r"more than a convolution reads the kernel \(add\)",
    ),
    "added": (
        lambda p, x: depthwise(x @ p["a"], p["more"] + select(p), PADDED),
        r"more than a convolution reads the kernel \(add\)",
    ),
    "of a divided size": (
        lambda p, x: (
            depthwise(x @ p["a"], k := kernel_select(p["w9"], {3: p["to3"]}), ((4, 4), (4, 4)))
            + (k + jnp.tanh(p["parts"]).reshape(9, 9, 1, 6)).mean((0, 1, 2))
        ),
        "the size of the kernel is that of an axis of several parts",
    ),
    "normalised": (
        lambda p, x: depthwise(x @ p["a"], jnp.exp(select(p)), PADDED),
        r"more than a convolution reads the kernel \(exp\)",
    ),
    "inside of a scan": (
        lambda p, x: lax.scan(lambda h, _: (depthwise(h, select(p), PADDED), None), x @ p["a"], None, length=2)[0],
        "the kernel or a matrix is no parameter there",
    ),
    "transposed": (
        lambda p, x: lax.conv_general_dilated(
            x @ p["a"],
            select(p),
            (1, 1),
            PADDED,
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        ),
        "the kernel of a transposed convolution",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_kernel_that_is_used_in_another_way_keeps_its_size(name):
    run, reason = FIXED[name]

    def whole(p, x):
        return run(p, x).mean((1, 2)) @ p["b"]

    params = random_params(SHAPES | DIVIDED)
    traced = tracing.trace(whole, params, IMAGES)
    kernel = "w9" if name == "of a divided size" else "w"
    assert kernel not in traced.groups
    found = {str(f.place): f.reason for f in traced.fixed}
    assert found[f"{kernel}[0]"] == found[f"{kernel}[1]"]
    assert re.match(reason, found[f"{kernel}[0]"]), found[f"{kernel}[0]"]
    np.testing.assert_allclose(traced.evaluate(params, IMAGES, {}), whole(params, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((7, 5, 1, 6), (3,), r"shape \(7, 5, 1, 6\); kernel_select needs spatial axes of one size"),
        ((7, 6), (3,), r"shape \(7, 6\)"),
        ((7, 7, 1, 6), (4,), "no centre of size 4; give sizes such as 3, 5, 7"),
        ((7, 7, 1, 6), (5,), r"matrix of size 5 has shape \(9, 9\); give it \(25, 25\)"),
    ],
)
def test_impossible_kernels_are_refused(shape, sizes, message):
    with pytest.raises(errors.ConfigError, match=message):
        kernel_select(jnp.zeros(shape), dict.fromkeys(sizes, jnp.zeros((9, 9))))


def test_sizes_that_are_not_smaller_are_ignored():
    """So a small network runs the same code."""
    kernel = jnp.zeros((3, 3, 1, 6))
    assert kernel_select(kernel, {5: jnp.zeros((25, 25)), 3: jnp.zeros((9, 9))}) is kernel


def test_every_size_gives_another_kernel():
    params = random_params(SHAPES)
    found = [ops.kernel_select(params["w"], {5: params["to5"], 3: params["to3"]}, (7, jnp.int32(k))) for k in SIZES]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(found, 2))
