"""Rules of sums, maxima and others along an axis.

A reduction may run along an axis that changes: entries beyond its active size become the neutral number, such as 0 in a
sum. A sort, a cumulative sum, a Fourier transform or the place of a maximum fixes its axis.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax.tracing.graph import Node
from superserve_jax.tracing.rules.base import Rule, bind, fix_axes, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def _lowest(dtype: Any) -> Any:
    return False if dtype == np.bool_ else -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return True if dtype == np.bool_ else np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


NEUTRAL = {
    "reduce_sum": lambda dtype: 0,
    "reduce_prod": lambda dtype: 1,
    "reduce_max": _lowest,
    "reduce_min": _highest,
    "reduce_and": _highest,
    "reduce_or": lambda dtype: 0,
}
_ALONG = {  # the axis along which a primitive works
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), "axis"),
    "sort": "dimension",
    "top_k": "axis",
}
_WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")


def relate_reduction(node: Node) -> None:
    """The reduced axes disappear."""
    axes = node.params["axes"]
    for output in node.outputs:
        tie_all([dim for i, dim in enumerate(node.inputs[0].dims) if i not in axes], output.dims, node)


def evaluate_reduction(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """Entries beyond the active size become the neutral number. Weights are zero there, which is neutral in a sum."""
    operand = node.inputs[0]
    if node.name == "reduce_sum" and at.is_zero_beyond(operand):
        return bind(node, values)
    return bind(node, [at.mask(values[0], operand, node.params["axes"], NEUTRAL[node.name](values[0].dtype))])


def relate_place(node: Node) -> None:
    """The place of the largest entry depends on every entry of an axis, so the axis is fixed."""
    fix_axes([node.inputs[0].dims[axis] for axis in node.params["axes"]], node)
    relate_reduction(node)


def relate_along(node: Node) -> None:
    """Works along one axis, which is fixed. All other axes stay the same."""
    axis = node.params.get(_ALONG[node.name], -1)
    first = node.inputs[0].dims
    axis %= len(first)
    for operand in (*node.inputs, *node.outputs):
        if operand.dims:
            fix_axes([operand.dims[axis]], node)
            tie_all(operand.dims, [*first[:axis], operand.dims[axis], *first[axis + 1 :]], node)


def relate_fft(node: Node) -> None:
    """A Fourier transform works along the last axes, which are fixed."""
    before, after = node.inputs[0].dims, node.outputs[0].dims
    first = len(before) - len(node.params["fft_lengths"])
    tie_all(before[:first], after[:first], node)
    fix_axes([*before[first:], *after[first:]], node)


def relate_window(node: Node) -> None:
    """Pooling. An axis with a window of 1 stays the same. All others are fixed."""
    p = node.params
    dilation = [p.get(name) or (1,) * len(p["window_dimensions"]) for name in ("base_dilation", "window_dilation")]
    columns = zip(p["window_dimensions"], p["window_strides"], p["padding"], *dilation, strict=True)
    arrays = [operand for operand in node.inputs if operand.dims]
    for axis, (window, stride, padding, *steps) in enumerate(columns):
        dims = [array.dims[axis] for array in (*arrays, *node.outputs)]
        if (window, stride, tuple(padding), *steps) == (1, 1, (0, 0), 1, 1):
            tie_all(dims[:1] * len(dims), dims, node)
        else:
            fix_axes(dims, node, "pooling")


RULES = {
    **{name: Rule(relate_reduction, evaluate_reduction) for name in NEUTRAL},
    **dict.fromkeys(("argmax", "argmin"), Rule(relate_place)),
    **dict.fromkeys(_ALONG, Rule(relate_along)),
    "fft": Rule(relate_fft),
    **dict.fromkeys(_WINDOWS, Rule(relate_window)),
}
