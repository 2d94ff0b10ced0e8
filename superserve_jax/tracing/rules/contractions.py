"""Rules of matrix products and convolutions. Both sum over an axis, so the entries beyond its active size must be zero."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from superserve_jax.tracing.dims import Dim, product, resolve, unify
from superserve_jax.tracing.graph import Node
from superserve_jax.tracing.rules.base import Rule, bind, fix_axes, fix_node, tie, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def relate_dot(node: Node) -> None:
    """Contracted axes are the same, and batch axes are the same. The output has the batch axes and then all others."""
    (contract_a, contract_b), (batch_a, batch_b) = node.params["dimension_numbers"]
    a, b = node.inputs[0].dims, node.inputs[1].dims
    for i, j in (*zip(contract_a, contract_b, strict=True), *zip(batch_a, batch_b, strict=True)):
        unify(a[i], b[j], node.where)
    kept = [a[i] for i in batch_a]
    kept += [dim for i, dim in enumerate(a) if i not in (*contract_a, *batch_a)]
    kept += [dim for i, dim in enumerate(b) if i not in (*contract_b, *batch_b)]
    tie_all(kept, node.outputs[0].dims, node)


def evaluate_dot(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """One operand must be zero beyond the active sizes of the contracted axes. Weights are already."""
    a, b = node.inputs
    if at.is_zero_beyond(a) or at.is_zero_beyond(b):
        return bind(node, values)
    (contract_a, contract_b), _ = node.params["dimension_numbers"]
    return bind(node, [at.mask(values[0], a, contract_a, 0), at.mask(values[1], b, contract_b, 0)])


def relate_convolution(node: Node) -> None:
    """Channels in are those of the kernel, or (group, channel) in a grouped convolution. Spatial axes cannot change."""
    numbers, groups = node.params["dimension_numbers"], node.params["feature_group_count"]
    x, kernel, out = node.inputs[0].dims, node.inputs[1].dims, node.outputs[0].dims
    if node.params["batch_group_count"] != 1:
        fix_node(node)
        return
    fix_axes([x[axis] for axis in numbers.lhs_spec[2:]], node, "a spatial axis of a convolution")
    for i, axis in enumerate(numbers.rhs_spec[2:]):
        _relate_kernel_size(node, i, kernel[axis])
    fix_axes([out[axis] for axis in numbers.out_spec[2:]], node, "a spatial axis of a convolution")
    unify(x[numbers.lhs_spec[0]], out[numbers.out_spec[0]], node.where)
    channels, kernel_in, kernel_out = x[numbers.lhs_spec[1]], kernel[numbers.rhs_spec[1]], kernel[numbers.rhs_spec[0]]
    if groups == 1:
        unify(channels, kernel_in, node.where)
    else:
        group = Dim(groups)
        unify(product([group, kernel_in]), channels, node.where)
        unify(product([group, Dim(kernel_out.size // groups)]), kernel_out, node.where)
    tie(kernel_out, out[numbers.out_spec[1]], node)


def _relate_kernel_size(node: Node, i: int, size: Dim) -> None:
    """A kernel's size is fixed, unless it comes from `kernel_select` and the padding may follow it."""
    steps, most = resolve(size).steps, size.size
    if not steps:
        fix_axes([size], node, "the size of a kernel")
    elif node.params["lhs_dilation"][i] != 1:
        fix_axes([size], node, "the kernel of a transposed convolution")
    elif min(node.params["padding"][i]) < (most - steps[0]) // 2 * node.params["rhs_dilation"][i]:
        fix_axes([size], node, "a padding that is too small for smaller kernels")


def _padding(node: Node, at: "Evaluation") -> tuple[tuple[int, int], ...]:
    """The padding for the kernel's sizes: the output keeps its size."""
    p, kernel = node.params, node.inputs[1].dims
    sizes = [kernel[axis] for axis in p["dimension_numbers"].rhs_spec[2:]]
    less = [(dim.size - at.limit(dim)) // 2 * step for dim, step in zip(sizes, p["rhs_dilation"], strict=True)]
    return tuple((low - cut, high - cut) for (low, high), cut in zip(p["padding"], less, strict=True))


def evaluate_convolution(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """As `evaluate_dot`. The number of groups and the padding follow the sizes."""
    numbers = node.params["dimension_numbers"]
    x, kernel = node.inputs
    channels, per_group = x.dims[numbers.lhs_spec[1]], kernel.dims[numbers.rhs_spec[1]]
    if not (at.is_zero_beyond(x) or at.is_zero_beyond(kernel)):
        values = [
            at.mask(values[0], x, (numbers.lhs_spec[1],), 0),
            at.mask(values[1], kernel, (numbers.rhs_spec[1],), 0),
        ]
    groups = node.params["feature_group_count"]
    if groups != 1:
        groups = at.limit(channels) // at.limit(per_group)
    return bind(node, values, feature_group_count=groups, padding=_padding(node, at))


RULES = {
    "dot_general": Rule(relate_dot, evaluate_dot),
    "conv_general_dilated": Rule(relate_convolution, evaluate_convolution),
}
