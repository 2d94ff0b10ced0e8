"""What `trace` gives: groups, errors, updates, one trace for each shape, and use by several threads."""

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing_checks import check, half_sizes, random_params
from tracing_models import MODELS, rows

from superserve_jax import errors, tracing

PARAMS = random_params({"w": (6, 8), "v": (8, 3)})


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def batch_norm(p, x):
    """Returns new running statistics, too."""
    h = x @ p["w"]
    mean, var = h.mean(0), h.var(0)
    h = (h - mean) * jax.lax.rsqrt(var + 1e-5) * p["norm"]["scale"]
    updates = {"norm": {"mean": 0.9 * p["norm"]["mean"] + 0.1 * mean, "var": 0.9 * p["norm"]["var"] + 0.1 * var}}
    return h @ p["v"], updates


NORM = random_params({"w": (6, 8), "v": (8, 3), "norm": {"scale": (8,), "mean": (8,), "var": (8,)}})


def test_parameters_may_be_nested():
    params = {"norm": {"scale": jnp.ones(8)}, "layers": [PARAMS["w"], PARAMS["v"]]}
    traced = tracing.trace(lambda p, x: (x @ p["layers"][0] * p["norm"]["scale"]) @ p["layers"][1], params, rows())
    assert {str(place) for place in traced.groups["layers.0[1]"].places} == {"layers.0[1]", "layers.1[0]", "norm.scale[0]"}


def test_new_statistics_are_those_of_the_small_network():
    """By hand: the statistics of 3 channels, and zeros beyond them."""
    traced = tracing.trace(batch_norm, NORM, rows(), has_updates=True)
    assert {str(place) for place in traced.groups["w[1]"].places} >= {"norm.mean[0]", "norm.var[0]"}
    small = jax.tree.map(lambda x: x[:3] if x.ndim == 1 else x, NORM | {"w": NORM["w"][:, :3], "v": NORM["v"][:3]})
    expected, new = batch_norm(small, rows())
    for size, beyond in ((3, 0), ((5, jnp.int32(3)), 2), ((8, jnp.int32(3)), 5)):
        result, updates = traced.evaluate(NORM, rows(), {"w[1]": size})
        np.testing.assert_allclose(result, expected, atol=1e-6)
        for name in ("mean", "var"):
            np.testing.assert_allclose(updates["norm"][name], np.pad(new["norm"][name], (0, beyond)), atol=1e-6)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        (lambda p: {"nrom": {"mean": p["norm"]["mean"]}}, errors.UnknownNameError, "did you mean 'norm.mean'"),
        (lambda p: {"norm": {"mean": p["w"]}}, errors.ConfigError, r"shape \[6, 8\]; give it the parameter's shape, \[8\]"),
    ],
)
def test_an_update_that_belongs_to_no_parameter_is_refused(updates, error, message):
    with pytest.raises(error, match=message):
        tracing.trace(lambda p, x: (batch_norm(p, x)[0], updates(p)), NORM, rows(), has_updates=True)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"w[2]": 4}, errors.UnknownNameError, r"unknown group of axes 'w\[2\]': did you mean 'w\[1\]'"),
        ({"w[1]": 9}, errors.ConfigError, "give an int from 1 to 8"),
        ({"w[1]": 0}, errors.ConfigError, "give an int from 1 to 8"),
        ({"w[1]": 0.5}, errors.ConfigError, "give an int from 1 to 8"),
        ({"w[1]": (9, 3)}, errors.ConfigError, "give an int from 1 to 8"),
    ],
)
def test_a_size_that_no_group_can_have_is_refused(sizes, error, message):
    with pytest.raises(error, match=message):
        tracing.trace(mlp, PARAMS, rows()).evaluate(PARAMS, rows(), sizes)


@pytest.mark.parametrize(
    ("params", "inputs", "message"),
    [
        (PARAMS | {"v": jnp.ones((7, 3))}, rows(), r"parameter 'v' has shape \(7, 3\).*traced with \(8, 3\)"),
        (PARAMS | {"u": jnp.ones(3)}, rows(), "params have the structure"),
        (PARAMS, rows()[:2], r"input 0 has shape \(2, 6\).*Trace it again"),
        (PARAMS, rows().astype(jnp.float16), "dtype float16"),
        (PARAMS, [rows()], "inputs have the structure"),
    ],
)
def test_other_arrays_than_those_traced_are_refused(params, inputs, message):
    with pytest.raises(errors.InputError, match=message):
        tracing.trace(mlp, PARAMS, rows()).evaluate(params, inputs, {})


def test_a_function_that_looks_at_numbers_is_refused():
    def function(p, x):
        return x @ p["w"] if x.sum() > 0 else x

    with pytest.raises(errors.ConfigError, match=r"looks at the numbers .* test_traced.py:\d+.*use jnp.where or lax.cond"):
        tracing.trace(function, PARAMS, rows())


def test_parameters_may_be_cut_before():
    traced = tracing.trace(mlp, PARAMS, rows())
    cut = traced.cut(PARAMS, {"w[1]": 3})
    np.testing.assert_array_equal(traced.evaluate(cut, rows(), {"w[1]": 3}), traced.evaluate(PARAMS, rows(), {"w[1]": 3}))


def test_shapes_are_enough_to_trace():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, rows()))
    assert tracing.trace(mlp, *shapes).groups == tracing.trace(mlp, PARAMS, rows()).groups


def test_arrays_that_are_not_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    traced = tracing.trace(mlp, params, rows().astype(jnp.bfloat16))
    small = mlp(traced.cut(params, {"w[1]": 3}), rows().astype(jnp.bfloat16))
    found = traced.evaluate(params, rows().astype(jnp.bfloat16), {"w[1]": (8, jnp.int32(3))})
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(small, np.float32), atol=2e-2)


def test_names_of_groups_do_not_depend_on_the_number_of_inputs():
    traces = tracing.Traces(mlp)
    assert traces.of(PARAMS, rows()).groups == traces.of(PARAMS, rows()[:1]).groups


def test_the_function_is_traced_once_for_each_shape():
    calls = []
    traces = tracing.Traces(lambda p, x: calls.append(x.shape) or mlp(p, x))
    for x in (rows(), rows() + 1, rows()[:2], rows()):
        traces.of(PARAMS, x)
    assert calls == [(4, 6), (2, 6)]


def test_threads_share_traces():
    """Eight threads trace several models at once, and evaluate them at several sizes."""
    names = ["mlp", "depthwise", "tied", "dense_net"]
    traces = {name: tracing.Traces(MODELS[name][0]) for name in names}
    params = {name: random_params(MODELS[name][1]) for name in names}
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        found = {}
        for name in names[thread % 4 :] + names[: thread % 4]:
            traced = traces[name].of(params[name], MODELS[name][2])
            alone = tracing.trace(MODELS[name][0], params[name], MODELS[name][2])
            assert alone.groups == traced.groups
            found[name] = (
                id(traced),
                jax.eval_shape(functools.partial(traced.evaluate, sizes=half_sizes(traced)), params[name], MODELS[name][2]),
            )
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        first, *others = threads.map(work, range(8))
    assert all(found == first for found in others)


def test_a_trace_can_be_made_inside_of_jit():
    @jax.jit
    def function(params, x):
        return tracing.trace(mlp, params, x).evaluate(params, x, {"w[1]": 3})

    traced = tracing.trace(mlp, PARAMS, rows())
    np.testing.assert_allclose(function(PARAMS, rows()), traced.evaluate(PARAMS, rows(), {"w[1]": 3}), atol=1e-6)


def test_a_group_may_be_left_whole():
    check(mlp, PARAMS, rows(), {})
