"""Rules of primitives that cut axes into parts, or put parts together: concatenate, split, slice, pad, dynamic_slice."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from superserve_jax.tracing.dims import Dim, cut, total, unify
from superserve_jax.tracing.graph import Node
from superserve_jax.tracing.rules.base import Rule, bind, fix_axes, tie, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def relate_concatenate(node: Node) -> None:
    """The axis of the output is the sum of the operands' axes."""
    out, axis = node.outputs[0].dims, node.params["dimension"]
    for operand in node.inputs:
        for i, dim in enumerate(operand.dims):
            if i != axis:
                tie(dim, out[i], node)
    unify(total([operand.dims[axis] for operand in node.inputs]), out[axis], node.where)


def relate_split(node: Node) -> None:
    """The axis of the operand is the sum of the outputs' axes."""
    before, axis = node.inputs[0].dims, node.params["axis"]
    begins = itertools.accumulate((int(size) for size in node.params["sizes"]), initial=0)
    for output, begin in zip(node.outputs, begins, strict=False):
        for i, dim in enumerate(output.dims):
            part = cut(before[i], begin, begin + dim.size, node.where) if i == axis else before[i]
            unify(part, dim, node.where)


def evaluate_split(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The lengths of the parts follow the sizes."""
    axis = node.params["axis"]
    return bind(node, values, sizes=tuple(at.limit(output.dims[axis]) for output in node.outputs))


def relate_slice(node: Node) -> None:
    """A part of an axis. An axis of which every n-th entry is taken cannot change."""
    p = node.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    for before, after, start, stop, stride in zip(
        node.inputs[0].dims, node.outputs[0].dims, p["start_indices"], p["limit_indices"], strides, strict=True
    ):
        if stride == 1:
            unify(cut(before, int(start), int(stop), node.where), after, node.where)
        else:
            fix_axes([before, after], node, "a slice with a step")


def evaluate_slice(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """A part begins behind what remains of the entries before it."""
    p, before, shape = node.params, node.inputs[0].dims, at.shape(node.outputs[0])
    starts = tuple(at.position(dim, int(start)) for dim, start in zip(before, p["start_indices"], strict=True))
    strides = p["strides"] or (1,) * len(starts)
    limits = tuple(
        start + length if stride == 1 else int(stop)
        for start, length, stride, stop in zip(starts, shape, strides, p["limit_indices"], strict=True)
    )
    return bind(node, values, start_indices=starts, limit_indices=limits)


def relate_pad(node: Node) -> None:
    """Padding puts new entries before and behind an axis. What is cut off, or put between entries, fixes it."""
    for before, after, (low, high, inner) in zip(
        node.inputs[0].dims, node.outputs[0].dims, node.params["padding_config"], strict=True
    ):
        if min(low, high) < 0 or inner:
            fix_axes([before, after], node)
        else:
            unify(total([Dim(low), before, Dim(high)]), after, node.where)


def evaluate_pad(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The numbers of new entries follow the sizes."""
    config = []
    for before, after, (low, high, inner) in zip(
        node.inputs[0].dims, node.outputs[0].dims, node.params["padding_config"], strict=True
    ):
        if min(low, high) < 0 or inner:
            config.append((low, high, inner))
            continue
        begin = at.position(after, int(low))
        config.append((begin, at.limit(after) - begin - at.limit(before), 0))
    return bind(node, values, padding_config=tuple(config))


def relate_dynamic_slice(node: Node) -> None:
    """A part whose place is computed. An axis of which only a part is taken cannot change."""
    for before, after in zip(node.inputs[0].dims, node.outputs[0].dims, strict=True):
        if before.size == after.size:
            unify(before, after, node.where)
        else:
            fix_axes([before, after], node)


def evaluate_dynamic_slice(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The lengths follow the sizes."""
    return bind(node, values, slice_sizes=at.shape(node.outputs[0]))


def relate_dynamic_update(node: Node) -> None:
    """Writes an array into a part of another. An axis of which only a part is written cannot change."""
    array, update = node.inputs[:2]
    tie_all(array.dims, node.outputs[0].dims, node)
    for whole, part in zip(array.dims, update.dims, strict=True):
        if whole.size == part.size:
            unify(whole, part, node.where)
        else:
            fix_axes([whole, part], node)


def relate_reverse(node: Node) -> None:
    """An axis that is reversed cannot change, because its first entries would become its last."""
    tie_all(node.inputs[0].dims, node.outputs[0].dims, node)
    fix_axes([node.inputs[0].dims[axis] for axis in node.params["dimensions"]], node, "an axis is reversed")


RULES = {
    "concatenate": Rule(relate_concatenate, moves=True),
    "split": Rule(relate_split, evaluate_split, moves=True),
    "slice": Rule(relate_slice, evaluate_slice, moves=True),
    "pad": Rule(relate_pad, evaluate_pad),
    "dynamic_slice": Rule(relate_dynamic_slice, evaluate_dynamic_slice),
    "dynamic_update_slice": Rule(relate_dynamic_update),
    "rev": Rule(relate_reverse, moves=True),
}
