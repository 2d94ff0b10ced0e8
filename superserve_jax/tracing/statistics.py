"""Checks that a norm's new running statistics come from one batch alone.

A norm such as nnx.BatchNorm computes `momentum * old + (1 - momentum) * batch`, and the library sets its momentum to 0. So a
new value depends on the old one by one product with 0. If the norm is called twice, there are two such products.
"""

from collections.abc import Iterable, Mapping, Sequence

from superserve_jax import errors
from superserve_jax.tracing.graph import Graph, Node, Operand, Scalar, Value
from superserve_jax.tracing.rules.calls import scan_counts
from superserve_jax.tracing.traced import Traced

_MANY = 2


def check(traced: Traced, names: Sequence[str], norms: Iterable[str]) -> None:
    """Raises ConfigError if the statistics of a norm do not come from one batch alone.

    Args:
      traced: the module in training.
      names: names of the parameters that get new values, in the order of the outputs.
      norms: the norms to check.
    """
    new = dict(zip(names, traced.graph.outputs[len(traced.graph.outputs) - len(names) :], strict=True))
    for name in (f"{norm}.{kind}" for norm in norms for kind in ("mean", "var")):
        old = traced.parameters[name]
        if new[name] is old:
            raise errors.ConfigError(
                f"in training, the module does not update '{name}': its code sets use_running_average itself. Give "
                "`call`, such as call=lambda module, x, train: module(x, train), that passes the flag on"
            )
        counts = _products(traced.graph, {old: frozenset([0])}).get(new[name], frozenset())
        if 0 in counts:
            raise errors.ConfigError(
                f"in training, '{name}' keeps a part of its old value, but statistics must be those of one batch; derive the "
                "norm from nnx.BatchNorm, or give it an attribute `momentum`, the part that it keeps, which is set to 0 here"
            )
        if _MANY in counts:
            raise errors.ConfigError(
                f"the norm '{name.rpartition('.')[0]}' is called more than once, but a subnet has its statistics at one "
                "place; use a norm of its own for each call"
            )


Counts = frozenset[int]


def _products(graph: Graph, given: Mapping[Operand, Counts]) -> dict[Operand, Counts]:
    """For each value that depends on the given ones: the numbers of products with 0 in between, at most `_MANY`."""
    found = dict(given)
    for node in graph.nodes:
        counts = [found.get(operand, frozenset()) for operand in node.inputs]
        if any(counts):
            found.update(zip(node.outputs, _outputs(node, counts), strict=True))
    return found


def _outputs(node: Node, counts: Sequence[Counts]) -> list[Counts]:
    if node.name == "cond":
        branches = [_of_body(body, counts[1:]) for body in node.bodies]
        return [frozenset[int]().union(*outputs) for outputs in zip(*branches, strict=True)]
    if node.name == "scan":
        consts, carry = scan_counts(node)
        first = _of_body(node.bodies[0], counts)
        again = _of_body(node.bodies[0], [*counts[:consts], *first[:carry], *counts[consts + carry :]])
        return [a | b for a, b in zip(first, again, strict=True)]
    if node.bodies:
        return _of_body(node.bodies[0], counts)
    is_zero = node.name == "mul" and any(isinstance(x, Scalar) and x.value == 0 for x in node.inputs)
    every = frozenset[int]().union(*counts)
    return [frozenset(min(n + is_zero, _MANY) for n in every)] * len(node.outputs)


def _of_body(body: Graph, counts: Sequence[Counts]) -> list[Counts]:
    given: dict[Operand, Counts] = dict(zip(body.inputs, counts, strict=True))
    found = _products(body, given)
    return [found.get(y, frozenset()) if isinstance(y, Value) else frozenset() for y in body.outputs]
