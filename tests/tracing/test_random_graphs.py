"""Random networks of the supported primitives: sliced, masked and bucketed equal the network built small.

Results, gradients and new running statistics are compared. A network is a list of layers. Every size follows from the shapes
of parameters.
"""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from tracing_cases import X
from tracing_checks import check, random_params, random_sizes

from superserve_jax import tracing

ENTRIES = [
    jnp.tanh,
    jnp.exp,
    jax.nn.relu,
    jax.nn.gelu,
    jax.nn.softplus,
    lambda h: jnp.log(h * h),
    lambda h: lax.rsqrt(h * h),
    lambda h: h / (h * h),
    lambda h: jnp.where(h > 0, jnp.sqrt(jnp.where(h > 0, h, 1)), -h),
]
"""Some of them are infinite at 0, which is what a layer has beyond its active size."""

ROWS = [
    lambda h: h - h.mean(1, keepdims=True),
    lambda h: h / (0.1 + h.std(1, keepdims=True)),
    jax.nn.softmax,
    jax.nn.log_softmax,
    lambda h: h - h.max(1, keepdims=True),
    lambda h: h * h.min(1, keepdims=True),
    lambda h: h / (1 + jnp.linalg.norm(h, axis=1, keepdims=True)),
    lambda h: h + jnp.tanh(h @ h.T).sum(1, keepdims=True),
    lambda h: jnp.cumsum(h, 0),
    lambda h: jnp.stack([h, jnp.tanh(h)]).max(0),
    lambda h: h - jnp.concatenate([h, 2 * h], 1).mean(1, keepdims=True),
    lambda h: h + h.reshape(2, 2, -1)[::-1].reshape(h.shape),
    jax.checkpoint(lambda h: h * jax.nn.sigmoid(h.mean(0))),
]

LAYERS = {  # {name: (function of the parameters and h, their shapes for a width w and a new size n, the new width)}
    "dense": (lambda p, h: h @ p["w"] + p["b"], lambda w, n: {"w": (w, n), "b": (n,)}, lambda w, n: n),
    "scale": (lambda p, h: h * p["g"] + p["b"], lambda w, n: {"g": (w,), "b": (w,)}, lambda w, n: w),
    "residual": (
        lambda p, h: h + jnp.tanh(h @ p["up"]) @ p["down"],
        lambda w, n: {"up": (w, n), "down": (n, w)},
        lambda w, n: w,
    ),
    "branch": (lambda p, h: jnp.concatenate([h, h @ p["w"]], 1), lambda w, n: {"w": (w, n)}, lambda w, n: w + n),
    "gated": (
        lambda p, h: jnp.multiply(*jnp.split(h @ p["w"].reshape(h.shape[1], -1), 2, axis=1)),
        lambda w, n: {"w": (w, 2, n)},
        lambda w, n: n,
    ),
    "heads": (
        lambda p, h: jax.nn.softmax(jnp.einsum("bi,inc->bnc", h, p["w"])).reshape(len(h), -1),
        lambda w, n: {"w": (w, n, 2)},
        lambda w, n: 2 * n,
    ),
    "repeat": (
        lambda p, h: (jnp.repeat(h, len(p["g"]), axis=1).reshape(*h.shape, -1) * p["g"]).reshape(len(h), -1),
        lambda w, n: {"g": (n,)},
        lambda w, n: w * n,
    ),
    "tile": (
        lambda p, h: (jnp.tile(h, (1, len(p["g"]))).reshape(len(h), -1, h.shape[1]) * p["g"][:, None]).reshape(len(h), -1),
        lambda w, n: {"g": (n,)},
        lambda w, n: w * n,
    ),
    "pad": (
        lambda p, h: jnp.pad(h, ((0, 0), (0, len(p["b"]) - h.shape[1])), constant_values=0.5) + p["b"],
        lambda w, n: {"b": (w + n,)},
        lambda w, n: w + n,
    ),
    "scan": (
        lambda p, h: lax.scan(lambda h, w: (h + jnp.tanh(h * w["g"]) @ w["w"], None), h, p)[0],
        lambda w, n: {"w": (n, w, w), "g": (n, w)},
        lambda w, n: w,
    ),
    "mixture": (
        lambda p, h: jnp.einsum("bn,nwv,bw->bv", jax.nn.softmax(h @ p["gate"]), p["w"], h),
        lambda w, n: {"gate": (w, n), "w": (n, w, 3)},
        lambda w, n: 3,
    ),
    "batch norm": (
        lambda p, h: (h - h.mean(0)) * lax.rsqrt(h.var(0) + 0.1) * p["scale"],
        lambda w, n: {"scale": (w,), "statistics": (w,)},
        lambda w, n: w,
    ),
}

layers = st.tuples(st.sampled_from([*LAYERS]), st.integers(2, 4))
functions = st.tuples(st.just("entries"), st.sampled_from(range(len(ENTRIES))))
rows = st.tuples(st.just("rows"), st.sampled_from(range(len(ROWS))))
networks = st.lists(layers | functions | rows, min_size=2, max_size=6)


def network(steps):
    """(function with updates, shapes) of a list of layers. The width stays small: a wide layer is followed by a dense one."""
    width, shapes, plan = 4, {"first": (6, 4)}, []
    for i, (name, number) in enumerate(steps):
        plan.append((str(i), name, number))
        if name in LAYERS:
            _, shapes_of, width_of = LAYERS[name]
            shapes[str(i)] = shapes_of(width, number)
            width = width_of(width, number)
        if width > 12:
            plan.append((f"{i}.narrow", "dense", 4))
            shapes[f"{i}.narrow"] = {"w": (width, 4), "b": (4,)}
            width = 4
    shapes["last"] = (width, 3)

    def function(params, x):
        h, updates = x @ params["first"], dict(params)  # a new value of each parameter; most stay the same
        for key, name, number in plan:
            if name == "batch norm":
                updates[key] = params[key] | {"statistics": 0.9 * params[key]["statistics"] + 0.1 * h.var(0)}
            h = {"entries": ENTRIES, "rows": ROWS}[name][number](h) if name not in LAYERS else LAYERS[name][0](params[key], h)
            h = h / (1 + abs(h))  # all numbers stay between -1 and 1, or rounding would differ
        return h @ params["last"], updates

    return function, shapes


def check_network(steps, seed):
    """In float64, because functions that are infinite at 0 make rounding errors large."""
    function, shapes = network(steps)
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        params = jax.tree.map(lambda array: array.astype(jnp.float64), random_params(shapes, seed))
        traced = tracing.trace(function, params, x, has_updates=True)
        assert traced.groups
        check(function, params, x, random_sizes(traced, seed), traced=traced, has_updates=True)


@settings(max_examples=8)
@given(networks, st.integers(0, 100))
def test_a_random_network_at_other_sizes_is_the_small_network(steps, seed):
    check_network(steps, seed)


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_has_sizes_that_can_change(name):
    function, shapes = network([(name, 3)])
    params = random_params(shapes)
    traced = tracing.trace(function, params, X, has_updates=True)
    fixed = {str(place.place) for place in traced.fixed}
    # the axis of a scan, the two parts of a gated unit, and the number 3 of the heads' features and of the mixture's width
    # may be fixed by the code
    assert traced.groups
    assert fixed <= {"first[0]", "last[1]", "0.w[0]", "0.g[0]"} | ({"0.w[1]"} if name == "gated" else set())
