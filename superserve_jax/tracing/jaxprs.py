"""Makes a `Graph` from a jaxpr.

- **Inlined**: calls of jitted functions. jax shares one jaxpr between all calls of a function; here each call gets its own
  values.
- **Kept, with bodies**: scan, cond, checkpoint (remat), and functions with a derivative of their own (custom_jvp, custom_vjp).
  relu is such a function: its derivative at 0 is 0, and that of its formula is 1/2.
- **Computed now**: operations on numbers alone. For example, `jnp.var` divides by `n - 0`, which becomes `n`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from superserve_jax.tracing import places
from superserve_jax.tracing.graph import Graph, Node, Operand, Scalar, Value

INLINED = ("jit", "pjit", "closed_call", "core_call")
CUSTOM_JVP = ("custom_jvp_call",)
CUSTOM_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")
REMAT = ("remat2", "checkpoint", "remat")
_ARITHMETIC = ("abs", "add", "convert_element_type", "div", "eq", "ge", "gt", "integer_pow", "le", "lt", "max", "min", "mul")
_ARITHMETIC += ("ne", "neg", "pow", "rsqrt", "select_n", "sqrt", "square", "sub")


def graph_of(closed: core.ClosedJaxpr, where: str = places.UNKNOWN, *, inline_custom: bool = False) -> Graph:
    """The graph of a jaxpr.

    Args:
      closed: the jaxpr.
      where: the place of operations that have no place of their own.
      inline_custom: inlines functions with derivatives of their own too, so the derivative of their formula counts.
    """
    builder = _Builder(inline_custom)
    inputs = [_value(var) for var in closed.jaxpr.invars]
    outputs = builder.inline(closed.jaxpr, closed.consts, inputs, where)
    return Graph(inputs, outputs, builder.nodes, builder.constants)


def _shape(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _value(var: Any) -> Value:
    return Value(var.aval.shape, var.aval.dtype)


class _Builder:
    """The nodes of one graph while it is made."""

    def __init__(self, inline_custom: bool):
        self.nodes: list[Node] = []
        self.constants: dict[Value, jax.Array] = {}
        self._inline_custom = inline_custom

    def inline(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Operand], where: str) -> list[Operand]:
        """Appends the equations of a jaxpr. Returns its outputs. `where` is for equations without a place of their own."""
        known: dict[core.Var, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        known.update((var, self._constant(const)) for var, const in zip(jaxpr.constvars, consts, strict=True))

        def read(atom: Any) -> Operand:
            return self._constant(atom.val, _shape(atom).dtype) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            outputs = self._add(equation, operands, places.of_equation(equation) or where)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, const: Any, dtype: Any = None) -> Operand:
        dtype = const.dtype if dtype is None else dtype
        if np.ndim(const) == 0 and isinstance(dtype, np.dtype) and not isinstance(const, Tracer):
            return Scalar(np.asarray(const, dtype))
        value = Value(np.shape(const), dtype)
        self.constants[value] = const
        return value

    def _add(self, equation: core.JaxprEqn, inputs: list[Operand], where: str) -> Sequence[Operand]:
        name, params = equation.primitive.name, equation.params
        if name in INLINED or (self._inline_custom and name in (*CUSTOM_JVP, *CUSTOM_VJP)):
            inner, consts = _body_of(params)
            return self.inline(inner, consts, inputs, where)
        if name in _ARITHMETIC and (number := _computed(equation, inputs)) is not None:
            return [number]
        outputs = [_value(var) for var in equation.outvars]
        node = Node(equation.primitive, dict(params), inputs, outputs, where, places.is_activation(equation))
        if name == "scan":
            node.bodies = (graph_of(params["jaxpr"], where, inline_custom=self._inline_custom),)
        elif name == "cond":
            node.bodies = tuple(graph_of(branch, where, inline_custom=self._inline_custom) for branch in params["branches"])
        elif name in REMAT:
            node.bodies = (self._body(params, inputs, where),)
        elif name in (*CUSTOM_JVP, *CUSTOM_VJP):
            node.bodies = (self._body(params, inputs, where), _derivative(equation, where))
        self.nodes.append(node)
        return outputs

    def _body(self, params: dict[str, Any], operands: Sequence[Operand], where: str) -> Graph:
        builder = _Builder(self._inline_custom)
        jaxpr, consts = _body_of(params)
        inputs = [_value(var) for var in jaxpr.invars]
        numbers = [operand if isinstance(operand, Scalar) else value for operand, value in zip(operands, inputs, strict=True)]
        outputs = builder.inline(jaxpr, consts, numbers, where)
        return Graph(inputs, outputs, builder.nodes, builder.constants)


def _body_of(params: dict[str, Any]) -> tuple[core.Jaxpr, Sequence[Any]]:
    inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def _computed(equation: core.JaxprEqn, inputs: Sequence[Operand]) -> Scalar | None:
    """The result of an operation on numbers alone."""
    numbers = [operand.value for operand in inputs if isinstance(operand, Scalar)]
    if len(numbers) != len(inputs) or _shape(equation.outvars[0]).shape:
        return None
    with jax.ensure_compile_time_eval():
        result = equation.primitive.bind(*map(jnp.asarray, numbers), **equation.params)
    return Scalar(np.asarray(result))


def is_float(dtype: Any) -> bool:
    """Whether arrays of this dtype have derivatives."""
    return jnp.issubdtype(dtype, jnp.inexact)


def _derivative(equation: core.JaxprEqn, where: str) -> Graph:
    """The derivative that a custom_jvp or a custom_vjp defines, traced at the sizes of the whole network.

    Its inputs are all operands of the call, then the tangents of those that are floats. For a custom_vjp, the cotangents of
    the outputs that are floats. It returns the tangents of these outputs, or the cotangents of these operands.
    """
    operands: list[Any] = [core.Var(atom.aval) for atom in equation.invars]
    info = core.DebugInfo("derivative", equation.primitive.name, ("",) * len(operands), ("",) * len(equation.outvars))
    jaxpr = core.Jaxpr([], operands, list(equation.outvars), [equation.replace(invars=operands)], debug_info=info)
    call = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
    floats_in = [i for i, var in enumerate(operands) if is_float(_shape(var).dtype)]
    floats_out = [i for i, var in enumerate(equation.outvars) if is_float(_shape(var).dtype)]

    def of_floats(values: Sequence[Any]) -> Any:
        def function(*floats: Any) -> list[Any]:
            given = dict(zip(floats_in, floats, strict=True))
            outputs = call(*(given.get(i, value) for i, value in enumerate(values)))
            return [outputs[i] for i in floats_out]

        return function

    def forward(values: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return jax.jvp(of_floats(values), tuple(values[i] for i in floats_in), tuple(tangents))[1]

    def backward(values: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        return jax.vjp(of_floats(values), *(values[i] for i in floats_in))[1](list(cotangents))

    is_jvp = equation.primitive.name in CUSTOM_JVP
    like = list(map(_shape, operands))
    results = list(map(_shape, equation.outvars))
    seeds = [like[i] for i in floats_in] if is_jvp else [results[i] for i in floats_out]
    closed = jax.make_jaxpr(forward if is_jvp else backward)(like, seeds)
    return graph_of(closed, where, inline_custom=True)
