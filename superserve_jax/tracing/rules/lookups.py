"""Rules of look-ups in tables, of writing into places of an array, of axes that are numbered, and of random numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from superserve_jax.tracing.graph import Node
from superserve_jax.tracing.rules.base import Rule, bind, fix_axes, fix_node, tie, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def _whole_axes(node: Node) -> dict[int, int]:
    """For a gather: {axis of the table that is taken as a whole: axis of the output}."""
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offsets = [axis for axis in range(len(sizes)) if axis not in gone]
    table = node.inputs[0].dims
    pairs = zip(offsets, numbers.offset_dims, strict=True)
    return {axis: out for axis, out in pairs if sizes[axis] == table[axis].size and axis not in numbers.start_index_map}


def relate_gather(node: Node) -> None:
    """A look-up such as `table[tokens]`. The table's rows are fixed. An axis that is taken as a whole stays the same."""
    numbers = node.params["dimension_numbers"]
    table, indices, out = node.inputs[0].dims, node.inputs[1].dims, node.outputs[0].dims
    whole = _whole_axes(node)
    for axis, dim in enumerate(table):
        if axis in whole:
            tie(dim, out[whole[axis]], node)
        else:
            fix_axes([dim], node, "a look-up")
    fix_axes([out[axis] for axis in numbers.offset_dims if axis not in whole.values()], node, "a look-up")
    fix_axes([indices[-1], *(indices[axis] for axis in numbers.start_indices_batching_dims)], node, "a look-up")
    tie_all(indices[:-1], [dim for axis, dim in enumerate(out) if axis not in numbers.offset_dims], node)


def evaluate_gather(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The lengths of axes that are taken as a whole follow the sizes."""
    sizes = list(node.params["slice_sizes"])
    for axis in _whole_axes(node):
        sizes[axis] = at.limit(node.inputs[0].dims[axis])
    return bind(node, values, slice_sizes=tuple(sizes))


def relate_scatter(node: Node) -> None:
    """Writes into places, such as `x.at[i].set(y)`. Axes with places are fixed. An axis that is written as a whole is free."""
    numbers, what = node.params["dimension_numbers"], "an axis that is written in places"
    array, indices, update = (operand.dims for operand in node.inputs)
    tie_all(array, node.outputs[0].dims, node)
    apart = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = zip((axis for axis in range(len(array)) if axis not in apart), numbers.update_window_dims, strict=True)
    written = {axis: update[window] for axis, window in windows}
    for axis, dim in enumerate(array):
        if axis in written and written[axis].size == dim.size and axis not in numbers.scatter_dims_to_operand_dims:
            tie(dim, written[axis], node)
        else:
            fix_axes([dim, *([written[axis]] if axis in written else [])], node, what)
    fix_axes([indices[-1], *(indices[axis] for axis in numbers.scatter_indices_batching_dims)], node, what)
    tie_all(indices[:-1], [dim for axis, dim in enumerate(update) if axis not in numbers.update_window_dims], node)


def relate_iota(node: Node) -> None:
    """The axis with the numbers 0, 1, 2, ... is fixed. Axes along which they repeat are free."""
    fix_axes([node.outputs[0].dims[node.params["dimension"]]], node, "an axis is numbered (arange, one-hot, positions)")


def evaluate_iota(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The parameter `shape` follows the sizes."""
    return bind(node, values, shape=at.shape(node.outputs[0]))


def relate_random(node: Node) -> None:
    """Random numbers of another shape are other numbers, so all axes are fixed."""
    what = "random numbers of this shape (for dropout, trace with a rate of 0 or deterministic=True)"
    for operand in (*node.inputs, *node.outputs):
        fix_axes(operand.dims, node, what)


def relate_bits(node: Node) -> None:
    """Read as another dtype, the bits of a finite number may be infinite. So no axis changes. Random numbers use this."""
    if len(node.inputs[0].dims) == len(node.outputs[0].dims):
        tie_all(node.inputs[0].dims, node.outputs[0].dims, node)
    fix_node(node)


RULES = {
    "gather": Rule(relate_gather, evaluate_gather),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "scatter-mul"), Rule(relate_scatter)),
    "iota": Rule(relate_iota, evaluate_iota),
    "bitcast_convert_type": Rule(relate_bits),
    **dict.fromkeys(("random_bits", "threefry2x32"), Rule(relate_random)),
}
