"""One small function for each of jax's primitives that has a rule. One file because a test checks that none is missing.

The key of a case is the primitive's name, perhaps with a note behind a colon. A case has a function of parameters and the
input `X`, the parameters' shapes, and the names of the groups that should be found.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tracing_models import convolution

X = jnp.asarray(np.random.default_rng(7).normal(size=(4, 6)), jnp.float32)
IMAGE = X.reshape(1, 2, 2, 6)
MESH = Mesh(np.asarray(jax.devices("cpu")[:1]), ("devices",))
TWO_LAYERS = {"a": (6, 8), "b": (8, 3)}
HEADS = {"a": (6, 3, 4), "b": (3, 4, 2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of (parameters, X), shapes {name: shape}, and names of the groups."""

    function: Callable
    shapes: dict
    groups: tuple = ()


def hidden(op, groups=("a[1]",)):
    """`op` is applied to a hidden layer (4, 8)."""
    return Case(lambda p, x: op(x @ p["a"]) @ p["b"], TWO_LAYERS, groups)


# Functions of single entries. `h` is any number and `u` is from 0 to 1. Beyond the active size both are 0, where some of these
# functions, or their derivatives, are infinite. `i` is an integer, `t` is true or false.
ONE = {
    "abs": lambda h, u: abs(h),
    "acos": lambda h, u: jnp.acos(u),
    "acosh": lambda h, u: lax.acosh(1 + u),
    "add": lambda h, u: h + u,
    "asin": lambda h, u: jnp.asin(u),
    "asinh": lambda h, u: lax.asinh(h),
    "atan": lambda h, u: lax.atan(h),
    "atan2": lambda h, u: lax.atan2(h, u),
    "atanh": lambda h, u: lax.atanh(u),
    "cbrt": lambda h, u: lax.cbrt(u),
    "ceil": lambda h, u: lax.ceil(h),
    "clamp": lambda h, u: lax.clamp(0.1, h, 0.5),
    "complex": lambda h, u: lax.real(lax.complex(h, u) * lax.complex(u, h)),
    "conj": lambda h, u: lax.imag(lax.conj(lax.complex(h, u))),
    "convert_element_type": lambda h, u: h.astype(jnp.float16),
    "copy": lambda h, u: jnp.copy(h),
    "cos": lambda h, u: jnp.cos(h),
    "cosh": lambda h, u: jnp.cosh(h),
    "digamma": lambda h, u: lax.digamma(u),
    "div": lambda h, u: h / u,
    "erf": lambda h, u: lax.erf(h),
    "erf_inv": lambda h, u: lax.erf_inv(u),
    "erfc": lambda h, u: lax.erfc(h),
    "exp": lambda h, u: jnp.exp(h),
    "exp2": lambda h, u: lax.exp2(h),
    "expm1": lambda h, u: jnp.expm1(h),
    "floor": lambda h, u: jnp.floor(h),
    "imag": lambda h, u: lax.imag(lax.complex(u, h)),
    "integer_pow": lambda h, u: u**-3,
    "is_finite": lambda h, u: jnp.isfinite(h),
    "lgamma": lambda h, u: lax.lgamma(u),
    "log": lambda h, u: jnp.log(u),
    "log1p": lambda h, u: jnp.log1p(u),
    "logistic": lambda h, u: jax.nn.sigmoid(h),
    "max": lambda h, u: jnp.maximum(h, u),
    "min": lambda h, u: jnp.minimum(h, 0.2),
    "mul": lambda h, u: h * u,
    "name": lambda h, u: checkpoint_name(h, "hidden"),
    "neg": lambda h, u: -h,
    "pow": lambda h, u: u**h,
    "reduce_precision": lambda h, u: lax.reduce_precision(h, 8, 10),
    "rem": lambda h, u: h % u,
    "round": lambda h, u: jnp.round(h),
    "rsqrt": lambda h, u: lax.rsqrt(u),
    "select_n": lambda h, u: jnp.where(h > u, h, 0.5),
    "sign": lambda h, u: jnp.sign(h),
    "sin": lambda h, u: jnp.sin(h),
    "sinh": lambda h, u: jnp.sinh(h),
    "sqrt": lambda h, u: jnp.sqrt(u),
    "square": lambda h, u: jnp.square(h),
    "stop_gradient": lambda h, u: lax.stop_gradient(h),
    "sub": lambda h, u: h - u,
    "tan": lambda h, u: jnp.tan(u),
    "tanh": lambda h, u: jnp.tanh(h),
    "optimization_barrier": lambda h, u: lax.optimization_barrier((h, u))[0],
    **{name: (lambda h, u, name=name: getattr(lax, name)(h, u)) for name in ("eq", "ge", "gt", "le", "lt", "ne")},
    **{
        name: (lambda h, u, op=op: op(h.astype(jnp.int32), (4 * u).astype(jnp.int32)))
        for name, op in {
            "and": lax.bitwise_and,
            "or": lax.bitwise_or,
            "xor": lax.bitwise_xor,
            "shift_left": lax.shift_left,
            "shift_right_arithmetic": lax.shift_right_arithmetic,
            "shift_right_logical": lax.shift_right_logical,
        }.items()
    },
    "not": lambda h, u: ~(h > u),
    "real": lambda h, u: lax.real(lax.complex(u, h)),
    "sharding_constraint": lambda h, u: lax.with_sharding_constraint(h, NamedSharding(MESH, PartitionSpec(None, "devices"))),
}


def single_entries(p, x):
    """{name: result of the function of single entries}."""
    h, u = x @ p["a"], jnp.square(jnp.tanh(x @ p["c"])) + jnp.square(p["d"])
    return {name: op(h, u).astype(jnp.float32) @ p["b"] for name, op in ONE.items()}


SHAPES = {
    "broadcast_in_dim": Case(
        lambda p, x: (jnp.broadcast_to(p["a"][:, None, :], (6, 4, p["a"].shape[1])) * x.T[:, :, None]).sum(0) @ p["b"],
        TWO_LAYERS,
        ("a[1]",),
    ),
    "transpose": hidden(lambda h: h.T.T),
    "squeeze": Case(lambda p, x: (x[:, None] @ p["a"]).squeeze(1) @ p["b"], TWO_LAYERS, ("a[1]",)),
    "reshape": Case(
        lambda p, x: (x @ p["a"].reshape(6, -1)).reshape(4, *p["b"].shape[:2]).reshape(4, -1) @ p["b"].reshape(-1, 2),
        HEADS,
        ("a[1]", "a[2]"),
    ),
    "stack": hidden(lambda h: jnp.stack([h, 2 * h], 1).sum(1)),
    "tile": Case(
        lambda p, x: jnp.tile(x @ p["a"], (1, p["b"].shape[0])) @ p["b"].reshape(-1, 3),
        {"a": (6, 8), "b": (2, 8, 3)},
        ("a[1]", "b[0]"),
    ),
}


def _halves(p, x):
    left, right = lax.split(x @ p["a"], (p["b"].shape[0], p["c"].shape[0]), axis=1)
    return left @ p["b"], right @ p["c"]


def _rotated(h):
    half = h.shape[1] // 2
    return jnp.concatenate([-h[:, half:], h[:, :half]], axis=1) + 0.3 * h


def _some_heads(p, x):
    h = x @ p["a"].reshape(6, -1)
    columns = p["b"].shape[0] * p["b"].shape[1]
    return h[:, :columns] @ p["b"].reshape(columns, -1), jnp.exp(h[:, columns:]) @ p["c"].reshape(h.shape[1] - columns, -1)


PARTS = {
    "concatenate": Case(
        lambda p, x: jnp.concatenate([x @ p["a"], x, jnp.tanh(x @ p["b"])], axis=1) @ p["c"],
        {"a": (6, 4), "b": (6, 3), "c": (13, 2)},
        ("a[1]", "b[1]"),
    ),
    "split": Case(_halves, {"a": (6, 8), "b": (5, 2), "c": (3, 2)}, ("b[0]", "c[0]")),
    "slice": hidden(_rotated, ("a[1].0",)),
    "slice: with a step": hidden(lambda h: jnp.concatenate([h[:, ::2], h[:, 1::2]], 1), ()),
    "slice: behind a part": Case(
        lambda p, x: (x @ p["a"])[:, p["c"].shape[0] :] @ p["b"] + (x @ p["a"])[:, : p["c"].shape[0]] @ p["c"],
        {"a": (6, 8), "b": (5, 2), "c": (3, 2)},
        ("b[0]", "c[0]"),
    ),
    "slice: of merged axes": Case(_some_heads, {"a": (6, 5, 3), "b": (2, 3, 2), "c": (3, 3, 2)}, ("a[2]", "b[0]", "c[0]")),
    "pad": Case(
        lambda p, x: jnp.pad(x @ p["a"], ((0, 0), (0, p["b"].shape[0] - p["a"].shape[1])), constant_values=2) @ p["b"],
        {"a": (6, 5), "b": (9, 3)},
        ("a[1]", "b[0].1"),
    ),
    "pad: between entries": Case(
        lambda p, x: lax.pad(x @ p["a"], 0.0, ((0, 0, 0), (0, 0, 1))) @ p["b"], {"a": (6, 5), "b": (9, 3)}
    ),
    "dynamic_slice": hidden(lambda h: lax.dynamic_slice(h, (jnp.int32(1), jnp.int32(0)), (2, h.shape[1]))),
    "dynamic_slice: of the axis": Case(
        lambda p, x: lax.dynamic_slice(x @ p["a"], (0, jnp.argmax(x) % 2), (4, 3)) @ p["b"], {"a": (6, 8), "b": (3, 2)}
    ),
    "dynamic_update_slice": hidden(lambda h: lax.dynamic_update_slice(h, 2 * h[:1], (jnp.argmax(X) % 2, 0))),
    "rev": hidden(lambda h: h[:, ::-1], ()),
    "rev: of another axis": hidden(lambda h: h[::-1]),
}


def _depthwise(p):
    return convolution(convolution(IMAGE, p["a"]), p["b"].reshape(3, 3, 1, -1), groups=p["a"].shape[3])


CONTRACTIONS = {
    "dot_general": Case(
        lambda p, x: jnp.einsum("bnc,dnc->bnd", jnp.einsum("bi,inc->bnc", x, p["a"]), p["b"]).sum(1),
        {"a": (6, 3, 4), "b": (2, 3, 4)},
        ("a[1]", "a[2]"),
    ),
    "dot_general: of activations": Case(
        lambda p, x: jnp.exp(x @ p["a"]) @ jnp.exp(x @ p["b"]).T, {"a": (6, 5), "b": (6, 5)}, ("a[1]",)
    ),
    "conv_general_dilated": Case(
        lambda p, x: convolution(jnp.exp(convolution(IMAGE, p["a"])), p["b"]),
        {"a": (1, 1, 6, 5), "b": (3, 3, 5, 2)},
        ("a[3]",),
    ),
    "conv_general_dilated: depthwise, twice as many": Case(
        lambda p, x: _depthwise(p) @ p["c"].reshape(-1, 3),
        {"a": (1, 1, 6, 4), "b": (3, 3, 4, 2), "c": (4, 2, 3)},
        ("a[3]", "b[3]"),
    ),
    "conv_general_dilated: of activations": Case(
        lambda p, x: convolution(jnp.exp(convolution(IMAGE, p["a"])), jnp.exp(p["b"])),
        {"a": (1, 1, 6, 5), "b": (1, 1, 5, 2)},
        ("a[3]",),
    ),
}

REDUCTIONS = {
    "reduce_sum": hidden(lambda h: h * jnp.exp(h).sum(1, keepdims=True)),
    "reduce_max": hidden(lambda h: h - (h - 3).max(1, keepdims=True)),
    "reduce_min": hidden(lambda h: h - (h + 3).min(1, keepdims=True)),
    "reduce_prod": hidden(lambda h: h + jnp.tanh(h).prod(1, keepdims=True)),
    "reduce_and": hidden(lambda h: h + (h < 0).all(1, keepdims=True)),
    "reduce_or": hidden(lambda h: h + (h > 1).any(1, keepdims=True)),
    "reduce_max: of integers": hidden(lambda h: h + (h.astype(jnp.int32) - 3).max(1, keepdims=True)),
    "argmax": hidden(lambda h: h + jnp.argmax(h, 1)[:, None], ()),
    "argmin": hidden(lambda h: h + jnp.argmin(h, 0)),
    "cumsum": hidden(lambda h: jnp.cumsum(h, 1), ()),
    "cumsum: of another axis": hidden(lambda h: jnp.cumsum(h, 0)),
    "cumprod": hidden(lambda h: jnp.cumprod(h, 0)),
    "cummax": hidden(lambda h: lax.cummax(h, 0)),
    "cummin": hidden(lambda h: lax.cummin(h, 0)),
    "cumlogsumexp": hidden(lambda h: lax.cumlogsumexp(h, 0)),
    "sort": hidden(lambda h: jnp.sort(h, 1), ()),
    "sort: of another axis": hidden(lambda h: jnp.sort(h, 0)),
    "top_k": hidden(lambda h: lax.top_k(h, h.shape[1])[0], ()),
    "fft": hidden(lambda h: jnp.fft.rfft(h, axis=0).real),
    "fft: of the axis": hidden(lambda h: jnp.fft.fft(h, axis=1).imag, ()),
    "reduce_window_max": hidden(lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (2, 1), (1, 1), "SAME")),
    "reduce_window_min": hidden(lambda h: lax.reduce_window(h, jnp.inf, lax.min, (2, 1), (1, 1), "VALID")),
    "reduce_window_sum": hidden(lambda h: lax.reduce_window(h, 0.0, lax.add, (2, 1), (2, 1), "VALID")),
    "reduce_window_sum: of the axis": hidden(lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME"), ()),
}

LOOKUPS = {
    "gather": Case(
        lambda p, x: jnp.tanh(p["a"][jnp.asarray([[0, 5], [3, 3]])]) @ p["b"], {"a": (7, 8), "b": (8, 2)}, ("a[1]",)
    ),
    "gather: of the axis": hidden(lambda h: h[:, jnp.asarray([0, 2, 1, 3, 4, 5, 7, 6])], ()),
    "scatter": hidden(lambda h: h.at[jnp.asarray([1, 3])].set(jnp.exp(h[:2]))),
    "scatter: of the axis": hidden(lambda h: h.at[:, 1].set(h[:, 0]), ()),
    "scatter: of a row for each row": hidden(lambda h: jax.vmap(lambda row, i: row.at[i].set(2.0))(h, jnp.arange(4)), ()),
    "scatter-add": hidden(lambda h: h.at[jnp.asarray([0, 2, 2])].add(jnp.exp(h[:3]))),
    "scatter-sub": hidden(lambda h: h.at[1].subtract(3.0)),
    "scatter-mul": hidden(lambda h: h.at[1].multiply(h[2], unique_indices=True)),
    "iota": hidden(lambda h: h + jnp.arange(h.shape[1]), ()),
    "iota: of another axis": hidden(lambda h: h + lax.broadcasted_iota(jnp.float32, h.shape, 0)),
    "bitcast_convert_type": hidden(lambda h: h + 1e-9 * lax.bitcast_convert_type(h, jnp.int32), ()),
    "random_bits": hidden(lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), ()),
}


@jax.custom_jvp
def twice(x):
    """Its derivative is wrong on purpose, so a test sees which one was used."""
    return jnp.tanh(x) + x.mean(-1, keepdims=True)


@twice.defjvp
def _(primals, tangents):
    return twice(*primals), 5 * tangents[0] + jnp.mean(tangents[0] * primals[0], -1, keepdims=True)


@jax.custom_vjp
def thrice(x, steps):
    """Its derivative is wrong on purpose, too."""
    return jnp.sin(x) * steps.sum()


thrice.defvjp(lambda x, steps: (thrice(x, steps), x), lambda x, g: (7 * g - x * jnp.mean(g * x, axis=-1, keepdims=True), None))


def _scan(p, x):
    def step(carry, rows):
        w, b = rows
        carry = jnp.tanh(carry @ w + b) + p["c"]
        return carry, jnp.exp(carry) @ p["b"]

    h, outputs = lax.scan(step, x @ p["a"], (p["w"], p["d"]), reverse=True)
    return h @ p["b"], outputs


def _cond(p, x):
    h = x @ p["a"]
    branches = lambda h: jnp.exp(h) + p["c"], lambda h: h - h.mean(-1, keepdims=True)
    return lax.cond(x.sum() > 0, *branches, lax.cond(x.sum() < 0, *branches, h)) @ p["b"]


def _carried_parameter(p, x):
    """The carried value is a parameter first, and so zero beyond its active size. Later it is not."""
    h, _ = lax.scan(lambda h, row: (jnp.exp(h) + p["e"], h.sum() + row.sum()), p["c"], x)
    sums = lax.scan(lambda h, row: (jnp.cos(h), h.sum() + row.sum()), p["c"], x)[1]
    return (x @ p["a"] * h) @ p["b"], sums


CALLS = {
    "cond": Case(_cond, {**TWO_LAYERS, "c": (8,)}, ("a[1]",)),
    "scan: carries a parameter": Case(_carried_parameter, {**TWO_LAYERS, "c": (8,), "e": (8,)}, ("a[1]",)),
    "scan": Case(_scan, {**TWO_LAYERS, "w": (2, 8, 8), "c": (8,), "d": (2, 8)}, ("a[1]",)),
    "remat2": hidden(jax.checkpoint(lambda h: jnp.exp(h) / jnp.exp(h).sum(1, keepdims=True))),
    "custom_jvp_call": hidden(twice),
    "custom_jvp_call: relu": hidden(lambda h: jax.nn.relu(h * (h > 0.1))),
    "custom_jvp_call: logaddexp": hidden(lambda h: jnp.logaddexp(h, 0.0)),
    "custom_vjp_call": hidden(functools.partial(thrice, steps=jnp.asarray([2, 1]))),
    "jit": hidden(jax.jit(lambda h: jax.jit(jnp.exp)(h) + jax.jit(jnp.exp)(2 * h))),
}

CASES = {**SHAPES, **PARTS, **CONTRACTIONS, **REDUCTIONS, **LOOKUPS, **CALLS}
