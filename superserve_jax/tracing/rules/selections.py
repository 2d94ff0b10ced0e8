"""The rule of `kernel_select`, which makes a kernel of another size. See `kernels.py`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from superserve_jax import ops
from superserve_jax.tracing import kernels
from superserve_jax.tracing.dims import Dim, unify
from superserve_jax.tracing.graph import Node
from superserve_jax.tracing.rules.base import Rule, fix_axes, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def relate(node: Node) -> None:
    """All spatial axes of the output have one new size. The channels stay the same."""
    before, after = node.inputs[0].dims, node.outputs[0].dims
    spatial = len(before) - 2
    sizes = [before[0].size, *(k for k, _ in node.params["steps"])]
    size = Dim(sizes[0], steps=sorted(sizes))
    for dim in after[:spatial]:
        unify(size, dim, node.where)
    tie_all(before[spatial:], after[spatial:], node)
    for matrix in node.inputs[1:]:
        fix_axes(matrix.dims, node, "the matrix of a kernel")


def evaluate(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The kernel of this size. A kernel that has the size already was made before, by `Network.cut`."""
    size = at.size(node.outputs[0].dims[0])
    if isinstance(size, int) and values[0].shape[0] == size:
        return [values[0]]
    return [ops.kernel_select(values[0], kernels.transforms(node, values), size)]


RULES = {kernels.NAME: Rule(relate, evaluate, moves=True)}
