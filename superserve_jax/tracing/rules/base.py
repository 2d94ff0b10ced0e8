"""What a rule is, and what rules share."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from superserve_jax.tracing.dims import Dim, fix, unify
from superserve_jax.tracing.graph import Node, Operand

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation

Evaluate = Callable[[Node, Sequence[Any], "Evaluation"], list[jax.Array]]


def bind(node: Node, values: Sequence[Any], **changed: Any) -> list[jax.Array]:
    """Runs the node's primitive.

    Args:
      node: the operation.
      values: its operands at the sizes of this evaluation.
      **changed: parameters of the primitive that hold sizes, at those of this evaluation.
    """
    outputs = node.primitive.bind(*values, **(node.params | changed))
    return list(outputs) if node.primitive.multiple_results else [outputs]


def unchanged(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """Evaluates a primitive whose parameters hold no sizes, and that keeps entries apart."""
    del at
    return bind(node, values)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the library treats a primitive.

    Args:
      relate: states which axes of a node's operands and outputs are the same, and fixes the axes that cannot change.
      evaluate: computes the outputs at other sizes. An operation that mixes the entries of an axis masks them first.
      moves: the primitive only moves entries. So if its operands are zero beyond their active sizes, so are its outputs.
    """

    relate: Callable[[Node], None]
    evaluate: Evaluate = unchanged
    moves: bool = False


def tie(a: Dim, b: Dim, node: Node) -> None:
    """Unifies two axes, unless one of them has length 1 and is repeated along the other."""
    if a.size == b.size:
        unify(a, b, node.where)


def tie_all(a: Iterable[Dim], b: Iterable[Dim], node: Node) -> None:
    """Unifies the axes of two arrays of the same rank."""
    for x, y in zip(a, b, strict=True):
        tie(x, y, node)


def fix_axes(dims: Iterable[Dim], node: Node, what: str | None = None) -> None:
    """Fixes axes. The reason is `what`, or the primitive's name, and the place."""
    for dim in dims:
        fix(dim, f"{what or node.name} at {node.where}")


def fix_node(node: Node) -> None:
    """Fixes all axes of all operands and outputs of a node. This is the rule of unknown primitives."""
    operands: list[Operand] = [*node.inputs, *node.outputs]
    for operand in operands:
        fix_axes(operand.dims, node)


UNKNOWN = Rule(fix_node)
