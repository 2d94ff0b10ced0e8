"""Compares a traced function at other sizes with the same function on small parameters: values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from tracing_cases import CASES, X

from superserve_jax import ops, tracing

# Options of XLA for programs that run once: they compile several times as fast.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 12):  # later versions lack the option
    FAST["xla_cpu_use_fusion_emitters"] = False


def random_params(shapes, seed=0):
    """Parameters of the given shapes: {name: shape}, also nested."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def random_sizes(traced, seed=0, equal=()):
    """A size of each group, from 1 to the whole size. Groups of one entry of `equal` have the same size."""
    rng = np.random.default_rng(seed)
    sizes = {name: int(rng.integers(1, group.size + 1)) for name, group in traced.groups.items()}
    return sizes | {name: sizes[names[0]] for names in equal for name in names}


def half_sizes(traced):
    """Half of each group's size, rounded up."""
    return {name: (group.size + 1) // 2 for name, group in traced.groups.items()}


def programs(traced, sizes):
    """The sliced, masked and bucketed forms of some sizes. The bucket's limits are between the sizes and the whole ones."""
    whole = {name: group.size for name, group in traced.groups.items()}
    return {
        "sliced": sizes,
        "masked": {name: (whole[name], jnp.int32(size)) for name, size in sizes.items()},
        "bucketed": {name: ((size + whole[name] + 1) // 2, jnp.int32(size)) for name, size in sizes.items()},
    }


def check(function, params, inputs, sizes=None, *, traced=None, small=None, has_updates=False):
    """Compares sliced, masked and bucketed with `function(small, inputs)`, and their gradients. Returns the trace.

    Args:
      function: a function of parameters and inputs.
      params: the whole network's parameters.
      inputs: the inputs.
      sizes: the sizes of some groups; half of each group if left out.
      traced: the trace, if there is one already.
      small: the smaller network's parameters, if `Traced.cut` should not make them.
      has_updates: the function returns a new value of every parameter, too.
    """
    traced = tracing.trace(function, params, inputs, has_updates=has_updates) if traced is None else traced
    sizes = half_sizes(traced) if sizes is None else sizes
    cut = traced.cut(params, sizes)
    small = cut if small is None else small
    jax.tree.map(np.testing.assert_array_equal, cut, small)
    forms = programs(traced, sizes)

    @functools.partial(jax.jit, compiler_options=FAST)
    def compute(params, small):
        found = {"small": value_and_gradients(function, small, inputs, has_updates)}
        for form, given in forms.items():
            evaluate = functools.partial(traced.evaluate, sizes=given)
            result, gradients = value_and_gradients(evaluate, params, inputs, has_updates)
            if has_updates:
                result = result[0], traced.cut(_placed(traced, params, result[1], given), sizes)
            found[form] = result, gradients, traced.cut(gradients, sizes)
        _, place = jax.vjp(lambda params: traced.cut(params, sizes), params)
        return found, place(jax.tree.map(jnp.ones_like, small))[0]

    found, inside = jax.tree.map(np.asarray, compute(params, small))
    expected, wanted = found.pop("small")
    for form, (result, gradients, cut) in found.items():
        jax.tree.map(lambda a, b, form=form: assert_close(a, b, form), result, expected)
        jax.tree.map(lambda a, b, form=form: assert_close(a, b, f"gradient, {form}"), cut, wanted)
        outside = jax.tree.map(_outside, gradients, inside)
        assert not any(jax.tree.leaves(outside)), (form, outside)
    return traced


def _placed(traced, params, arrays, sizes):
    """Arrays that are cut to the limits of `sizes`, put back into arrays of the whole network. The rest is zero."""
    limits = {name: ops.limit(size) for name, size in sizes.items()}
    return jax.vjp(lambda params: traced.cut(params, limits), params)[1](arrays)[0]


def _outside(gradient, inside):
    """The largest gradient of a parameter that the smaller network lacks. Not a number counts as infinite."""
    rest = np.where(inside == 0, np.abs(gradient), 0)
    return float(np.nan_to_num(rest, nan=np.inf).max(initial=0))


def value_and_gradients(function, params, inputs, has_updates=False):
    """The result, and the gradients of a weighted sum of its float arrays (without updates, whose shapes may differ)."""

    def loss(params):
        result = function(params, inputs)
        floats = [y for y in jax.tree.leaves(result[0] if has_updates else result) if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum(jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))) for y in floats), result

    gradients, result = jax.grad(loss, has_aux=True)(params)
    return result, gradients


def assert_close(found, expected, what):
    """Equal up to 1e-6 of the largest entry; in float64, up to 1e-10."""
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    tolerance = 1e-10 if found.dtype == np.float64 else 1e-6
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(1.0, float(np.abs(np.nan_to_num(expected)).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale, err_msg=what)


def primitives(function, *arguments):
    """Names of all primitives of a function's jaxpr, also of those inside calls."""
    found = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            found.add(equation.primitive.name)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def combined(cases):
    """(function, shapes) of many cases at once, with the results {name: result of the case}."""

    def function(params, inputs):
        return {name: case.function(params[name], inputs) for name, case in cases.items()}

    return function, {name: case.shapes for name, case in cases.items()}


def check_cases(cases):
    """Compares many cases at once with small parameters."""
    function, shapes = combined(cases)
    return check(function, random_params(shapes), X)


def check_axes(name):
    """Checks that a case has its primitive, and the groups that are expected. Returns the trace."""
    case = CASES[name]
    params = random_params(case.shapes)
    assert name.split(":")[0] in primitives(case.function, params, X)
    traced = tracing.trace(case.function, params, X)
    assert {*traced.groups} == {*case.groups}
    return traced


def reasons(function, shapes, inputs=X):
    """Why the axes of parameters are fixed: {"name[axis]": reason}, without the lines' numbers."""
    traced = tracing.trace(function, random_params(shapes), inputs)
    return {str(fixed.place): re.sub(r":\d+", "", fixed.reason) for fixed in traced.fixed}
