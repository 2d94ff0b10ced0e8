"""Rules of primitives that change how an array's axes are arranged: broadcast, transpose, reshape, squeeze, stack, tile."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from superserve_jax.tracing.dims import Dim, product, unify
from superserve_jax.tracing.graph import Node
from superserve_jax.tracing.rules.base import Rule, bind, fix_axes, fix_node, tie, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def relate_broadcast(node: Node) -> None:
    """An axis that is not repeated stays the same. New axes are axes of their own."""
    out = node.outputs[0].dims
    for dim, axis in zip(node.inputs[0].dims, node.params["broadcast_dimensions"], strict=True):
        tie(dim, out[axis], node)


def evaluate_broadcast(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The parameter `shape` follows the sizes."""
    return bind(node, values, shape=at.shape(node.outputs[0]))


def relate_transpose(node: Node) -> None:
    """The axes change their order."""
    before = node.inputs[0].dims
    tie_all(node.outputs[0].dims, [before[axis] for axis in node.params["permutation"]], node)


def relate_squeeze(node: Node) -> None:
    """Axes of length 1 are removed."""
    gone = {axis % len(node.inputs[0].dims) for axis in node.params["dimensions"]}
    tie_all([dim for axis, dim in enumerate(node.inputs[0].dims) if axis not in gone], node.outputs[0].dims, node)


def relate_reshape(node: Node) -> None:
    """Axes are merged and divided. Each shortest run of axes with the same number of entries before and after is one dim."""
    before = [dim for dim in node.inputs[0].dims if dim.size != 1]
    after = [dim for dim in node.outputs[0].dims if dim.size != 1]
    if node.params.get("dimensions") is not None or any(dim.size == 0 for dim in (*before, *after)):
        fix_node(node)
        return
    while before and after:
        left, right = [before.pop(0)], [after.pop(0)]
        while (x := _count(left)) != (y := _count(right)):
            if x < y:
                left.append(before.pop(0))
            else:
                right.append(after.pop(0))
        unify(product(left), product(right), node.where)


def _count(dims: Sequence[Dim]) -> int:
    return product(dims).size


def evaluate_reshape(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The parameter `new_sizes` follows the sizes."""
    return bind(node, values, new_sizes=at.shape(node.outputs[0]))


def relate_stack(node: Node) -> None:
    """Arrays of one shape get a new axis, which numbers them."""
    out = list(node.outputs[0].dims)
    fix_axes([out.pop(node.params["axis"])], node)
    for operand in node.inputs:
        tie_all(operand.dims, out, node)


def relate_unstack(node: Node) -> None:
    """The opposite of a stack. jax 0.12 has it where Python iterates over an array."""
    rest = list(node.inputs[0].dims)
    fix_axes([rest.pop(node.params["axis"])], node)
    for output in node.outputs:
        tie_all(rest, output.dims, node)


def relate_tile(node: Node) -> None:
    """An axis is repeated: copy 0 of all entries, then copy 1, and so on."""
    for before, after, times in zip(node.inputs[0].dims, node.outputs[0].dims, node.params["reps"], strict=True):
        unify(product([Dim(times), before]), after, node.where)


def evaluate_tile(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The number of copies follows the sizes."""
    before, after = node.inputs[0].dims, node.outputs[0].dims
    return bind(node, values, reps=tuple(at.limit(b) // at.limit(a) for a, b in zip(before, after, strict=True)))


RULES = {
    "broadcast_in_dim": Rule(relate_broadcast, evaluate_broadcast),
    "transpose": Rule(relate_transpose, moves=True),
    "squeeze": Rule(relate_squeeze, moves=True),
    "reshape": Rule(relate_reshape, evaluate_reshape, moves=True),
    "stack": Rule(relate_stack, moves=True),
    "unstack": Rule(relate_unstack, moves=True),
    "tile": Rule(relate_tile, evaluate_tile),
}
