"""Rules of functions of single entries, such as add and exp. Their operands and their output have the same axes.

An entry beyond the active size may hold any finite number, and must stay finite: in a gradient it is multiplied with zero,
and zero times infinity is not a number. So functions that are not finite everywhere get a harmless number there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax.tracing.graph import Node, Value
from superserve_jax.tracing.rules.base import Rule, bind, fix_node, tie, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation

FINITE = (
    *("abs", "add", "add_any", "and", "asinh", "atan", "ceil", "clamp", "complex", "conj", "convert_element_type", "copy"),
    *("copy_p", "cos", "eq", "erf", "erfc", "floor", "ge", "gt", "imag", "is_finite", "le", "logistic", "lt", "max", "min"),
    *("mul", "name", "ne", "neg", "not", "or", "real", "reduce_precision", "round", "select_n", "shift_left"),
    *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "square", "stop_gradient", "sub", "tanh", "xor"),
)
# The harmless operands. None: this operand may hold any finite number.
HARMLESS: dict[str, tuple[float | None, ...]] = {
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh", "tan", "asin", "acos", "atanh", "erf_inv"), (0,)),
    **dict.fromkeys(("log", "log1p", "sqrt", "rsqrt", "cbrt", "integer_pow", "lgamma", "digamma"), (1,)),
    "acosh": (2,),
    "atan2": (0, 1),
    "div": (None, 1),
    "rem": (None, 1),
    "pow": (1, 1),
}
_MOVING = ("convert_element_type", "copy", "copy_p", "name", "stop_gradient", "neg", "reduce_precision")


def relate(node: Node) -> None:
    """All operands and the output have the same axes. A number has no axes, and an axis of length 1 is repeated."""
    out = node.outputs[0].dims
    if any(operand.dims and len(operand.dims) != len(out) for operand in node.inputs):
        fix_node(node)
        return
    for operand in node.inputs:
        if operand.dims:
            tie_all(operand.dims, out, node)


def relate_each(node: Node) -> None:
    """The rule of a primitive with as many outputs as operands, such as optimization_barrier."""
    for operand, output in zip(node.inputs, node.outputs, strict=True):
        for a, b in zip(operand.dims, output.dims, strict=True):
            tie(a, b, node)


def evaluate_same(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """Returns the operands. A sharding says where an array lies. It may not fit a smaller array."""
    del node, at
    return list(values)


def evaluate_harmless(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """Replaces entries beyond the active size by numbers at which the function and its derivative are finite."""
    return bind(node, harmless(node, values, at))


def harmless(node: Node, values: Sequence[Any], at: "Evaluation") -> list[Any]:
    """The operands with harmless numbers beyond their active sizes."""
    neutrals = HARMLESS[node.name]
    return [
        value if neutral is None else at.mask(value, operand, range(len(operand.dims)), neutral)
        for value, operand, neutral in zip(values, node.inputs, neutrals, strict=True)
    ]


def evaluate_division(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """A mean divides by its number of entries at these sizes."""
    x, count = values[0], at.count(node)
    if count is not None:
        return bind(node, [x, _number(count, x.dtype)])
    return evaluate_harmless(node, values, at)


def evaluate_product(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """A mean may also multiply by one over its number of entries."""
    count = at.count(node)
    if count is None:
        return bind(node, values)
    x = next(value for value, operand in zip(values, node.inputs, strict=True) if isinstance(operand, Value))
    return bind(node, [x, _number(1 / count, x.dtype)])


def _number(count: float | jax.Array, dtype: Any) -> Any:
    return jnp.asarray(count).astype(dtype) if isinstance(count, jax.Array) else np.asarray(count, dtype)


RULES = {
    **{name: Rule(relate, moves=name in _MOVING) for name in FINITE},
    **{name: Rule(relate, evaluate_harmless) for name in HARMLESS},
    "div": Rule(relate, evaluate_division),
    "mul": Rule(relate, evaluate_product),
    "optimization_barrier": Rule(relate_each, moves=True),
    "sharding_constraint": Rule(relate_each, evaluate_same, moves=True),
}
