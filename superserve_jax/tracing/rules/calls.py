"""Rules of primitives that call functions: scan, cond, checkpoint, and functions with derivatives of their own.

The axes inside of the function are those outside. At other sizes, the function's graph is evaluated in the same way, inside
of a new scan, switch, checkpoint, custom_jvp or custom_vjp.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from superserve_jax.tracing.dims import unify
from superserve_jax.tracing.graph import Node, Operand
from superserve_jax.tracing.jaxprs import CUSTOM_JVP, CUSTOM_VJP, REMAT, is_float
from superserve_jax.tracing.rules.base import Rule, fix_axes, tie_all

if TYPE_CHECKING:
    from superserve_jax.tracing.evaluation import Evaluation


def _tie_arrays(a: Sequence[Operand], b: Sequence[Operand], node: Node) -> None:
    for x, y in zip(a, b, strict=True):
        if x.dims and y.dims:
            tie_all(x.dims, y.dims, node)


def scan_counts(node: Node) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried. jax 0.12 has them in one parameter."""
    p = node.params
    if "num_consts" in p:
        return p["num_consts"], p["num_carry"]
    consts, carry, _ = p["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def relate_scan(node: Node) -> None:
    """Constants and carried values keep their axes. The axis over which the scan runs is fixed."""
    (body,) = node.bodies
    consts, carry = scan_counts(node)
    whole = consts + carry
    _tie_arrays(node.inputs[:whole], body.inputs[:whole], node)
    _tie_arrays(node.outputs[:carry], body.outputs[:carry], node)
    _tie_arrays(node.outputs[:carry], node.inputs[consts:whole], node)
    stacked_in = zip(node.inputs[whole:], body.inputs[whole:], strict=True)
    stacked_out = zip(node.outputs[carry:], body.outputs[carry:], strict=True)
    for stacked, one in (*stacked_in, *stacked_out):
        fix_axes(stacked.dims[:1], node, "the axis of a scan")
        for a, b in zip(stacked.dims[1:], one.dims, strict=True):
            unify(a, b, node.where)


def evaluate_scan(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """A scan over the body at these sizes."""
    (body,), p = node.bodies, node.params
    consts, carry = scan_counts(node)
    whole = consts + carry
    zeros = _zeros(node, at)
    zeros[consts:whole] = [False] * carry  # the body computes the next ones

    def step(carried: tuple[Any, ...], rows: tuple[Any, ...]) -> tuple[Any, Any]:
        outputs = at.run(body, [*values[:consts], *carried, *rows], zeros)
        return tuple(outputs[:carry]), tuple(outputs[carry:])

    carried, stacked = lax.scan(
        step,
        tuple(values[consts:whole]),
        tuple(values[whole:]),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carried, *stacked]


def relate_cond(node: Node) -> None:
    """All branches have the operands and the outputs of the node. The first operand is the number of the branch."""
    for body in node.bodies:
        _tie_arrays(node.inputs[1:], body.inputs, node)
        _tie_arrays(node.outputs, body.outputs, node)


def evaluate_cond(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """A switch between the branches at these sizes."""
    zeros = _zeros(node, at)[1:]
    branches = [lambda *operands, body=body: tuple(at.run(body, operands, zeros)) for body in node.bodies]
    return list(lax.switch(values[0], branches, *values[1:]))


def relate_call(node: Node) -> None:
    """A function's arguments are the operands, its results are the outputs."""
    body = node.bodies[0]
    _tie_arrays(node.inputs, body.inputs, node)
    _tie_arrays(node.outputs, body.outputs, node)


def _function(node: Node, zeros: Sequence[bool], at: "Evaluation") -> Callable[..., tuple[jax.Array, ...]]:
    """The function that a node calls, at these sizes."""
    return lambda *values: tuple(at.run(node.bodies[0], values, zeros))


def _zeros(node: Node, at: "Evaluation") -> list[bool]:
    """Which operands of a node are zero beyond their active sizes."""
    return [at.is_zero_beyond(operand) for operand in node.inputs]


def evaluate_checkpoint(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The function at these sizes, whose intermediate values are still computed again for the gradient."""
    call = _function(node, _zeros(node, at), at)
    kept = jax.checkpoint(call, prevent_cse=node.params["prevent_cse"], policy=node.params["policy"])  # pyright: ignore
    return list(kept(*values))


def _floats(operands: Sequence[Operand | Any]) -> list[Any]:
    return [operand for operand in operands if is_float(_dtype(operand))]


def _dtype(operand: Any) -> Any:
    return getattr(operand, "dtype", None) or operand.value.dtype


def relate_jvp(node: Node) -> None:
    """A tangent has the axes of its value."""
    relate_call(node)
    derivative = node.bodies[1]
    seeds = [*node.inputs, *_floats(node.inputs)]
    _tie_arrays(seeds, derivative.inputs, node)
    _tie_arrays(_floats(node.outputs), derivative.outputs, node)


def relate_vjp(node: Node) -> None:
    """A cotangent has the axes of its value."""
    relate_call(node)
    derivative = node.bodies[1]
    _tie_arrays([*node.inputs, *_floats(node.outputs)], derivative.inputs, node)
    _tie_arrays(_floats(node.inputs), derivative.outputs, node)


def evaluate_jvp(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The function at these sizes, with its own derivative at these sizes."""
    derivative, zeros = node.bodies[1], _zeros(node, at)
    call = jax.custom_jvp(_function(node, zeros, at))

    def forward(values: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        seeds = [tangent for value, tangent in zip(values, tangents, strict=True) if is_float(value.dtype)]
        found = iter(at.run(derivative, [*values, *seeds], [*zeros, *[False] * len(seeds)]))
        outputs = call(*values)
        return outputs, tuple(next(found) if is_float(y.dtype) else np.zeros(y.shape, jax.dtypes.float0) for y in outputs)

    call.defjvp(forward)
    return list(call(*values))


def evaluate_vjp(node: Node, values: Sequence[Any], at: "Evaluation") -> list[jax.Array]:
    """The function at these sizes, with its own derivative at these sizes. The derivative computes the function again."""
    derivative, zeros = node.bodies[1], _zeros(node, at)
    call = jax.custom_vjp(_function(node, zeros, at))

    def forward(*values: Any) -> tuple[Any, Any]:
        return call(*values), values

    def backward(values: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        outputs = node.outputs
        seeds = [cotangent for y, cotangent in zip(outputs, cotangents, strict=True) if is_float(y.dtype)]
        found = iter(at.run(derivative, [*values, *seeds], [*zeros, *[False] * len(seeds)]))
        return tuple(next(found) if is_float(value.dtype) else None for value in values)

    call.defvjp(forward, backward)
    return list(call(*values))


RULES = {
    "scan": Rule(relate_scan, evaluate_scan),
    "cond": Rule(relate_cond, evaluate_cond),
    **dict.fromkeys(REMAT, Rule(relate_call, evaluate_checkpoint)),
    **dict.fromkeys(CUSTOM_JVP, Rule(relate_jvp, evaluate_jvp)),
    **dict.fromkeys(CUSTOM_VJP, Rule(relate_vjp, evaluate_vjp)),
}
