"""Finds the norms that can be folded into the convolution before them, see `supernets.family.Fold`.

In inference, a norm such as nnx.BatchNorm computes

    (x - mean) * (rsqrt(var + eps) * scale) + bias

It can be folded if `x` is the output of a convolution whose kernel is a parameter, and nothing else reads the kernel or a
value on the way. A folded norm computes `x + bias`, with other numbers in the kernel and in the bias. A block that may be
left out adds to its input, so no convolution and its norm are on two sides of a block's end.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from superserve_jax.supernets.family import Fold
from superserve_jax.tracing import kernels
from superserve_jax.tracing.dims import leaves
from superserve_jax.tracing.graph import Graph, Node, Operand, Scalar, Value

_CASTING = ("convert_element_type", "copy", "copy_p", "name")
_KEEPING = (*_CASTING, "broadcast_in_dim", "reshape", "squeeze")
_FORMULAS = {
    ("add", "eps", "var"): "var + eps",
    ("rsqrt", "var + eps"): "rsqrt(var + eps)",
    ("mul", "rsqrt(var + eps)", "scale"): "factor",
    ("sub", "x", "mean"): "x - mean",
    ("mul", "factor", "x - mean"): "scaled",
    ("add", "bias", "scaled"): "norm",
}
"""What an operation makes of what it reads. The operands of "add" and "mul" are sorted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Foldable:
    """A norm that can be folded.

    Args:
      fold: the names of the norm and of its parameters.
      scaled: the value to which the norm adds its bias.
      convolved: the convolution's output, which takes the place of `scaled`.
      nodes: the operations that are not needed then.
    """

    fold: Fold
    scaled: Value
    convolved: Value
    nodes: frozenset[Node]


@dataclasses.dataclass(frozen=True)
class _Term:
    """A part of a norm's formula.

    Args:
      what: "mean", "var", "scale", "bias", "eps", "kernel", "x", or what `_FORMULAS` makes of these.
      norm: the norm's path.
      kernel: the name of the convolution's kernel.
      convolved: the convolution's output, in the dtype in which the norm reads it.
      eps: the number that is added to the variance.
      nodes: the operations that made it, without the convolution.
    """

    what: str
    norm: str | None = None
    kernel: str | None = None
    convolved: Value | None = None
    eps: float | None = None
    nodes: frozenset[Node] = frozenset()


def find(graph: Graph, parameters: Mapping[str, Value]) -> dict[str, Foldable]:
    """The norms that can be folded, by their paths.

    Args:
      graph: a related graph, traced in inference.
      parameters: those of its inputs that are parameters or statistics, by dotted path.
    """
    reads = collections.Counter([*graph.outputs, *(operand for node in graph.nodes for operand in node.inputs)])
    terms = {value: _parameter(name, parameters) for name, value in parameters.items() if reads[value] == 1}
    found = {}
    for node in graph.nodes:
        term = _term(node, [_operand(operand, terms) for operand in node.inputs])
        if term is None:
            continue
        if term.what == "norm" and term.norm and term.kernel and term.convolved:
            scaled = next(x for x in node.inputs if isinstance(x, Value) and terms[x].what == "scaled")
            fold = Fold(term.norm, term.kernel, f"{term.norm}.scale", f"{term.norm}.bias", term.eps or 0.0)
            channels = [parameters[f"{term.norm}.{part}"].dims for part in ("mean", "var", "scale", "bias")]
            is_fitting = (scaled.shape, scaled.dtype) == (term.convolved.shape, term.convolved.dtype)
            if is_fitting and all(
                len(dims) == 1 and leaves(dims[0]) == leaves(parameters[fold.kernel].dims[-1]) for dims in channels
            ):
                found[term.norm] = Foldable(fold, scaled, term.convolved, terms[scaled].nodes)
        elif reads[node.outputs[0]] == 1:
            terms[node.outputs[0]] = term
    return found


def _parameter(name: str, parameters: Mapping[str, Value]) -> _Term:
    path, _, part = name.rpartition(".")
    is_of_norm = part in ("mean", "var", "scale", "bias") and f"{path}.mean" in parameters
    return _Term(part, norm=path) if is_of_norm else _Term("kernel", kernel=name)


def _operand(operand: Operand, terms: Mapping[Value, _Term]) -> _Term | None:
    return _Term("eps", eps=float(operand.value)) if isinstance(operand, Scalar) else terms.get(operand)


def _term(node: Node, parts: Sequence[_Term | None]) -> _Term | None:
    """What a node computes. None if it is no part of a norm that can be folded."""
    if node.name == "conv_general_dilated":
        return _convolution(node, parts[1])
    if node.name == kernels.NAME:  # its matrices mix the entries of a channel, so a factor of the channel passes them
        return parts[0] if parts[0] is not None and parts[0].what == "kernel" else None
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if node.name in _KEEPING:
        return _kept(node, known[0])
    whats = [part.what for part in known]
    what = _FORMULAS.get((node.name, *(sorted(whats) if node.name in ("add", "mul") else whats)))
    if what is None or len({part.norm for part in known} - {None}) > 1:
        return None
    fields = {name: [getattr(part, name) for part in known] for name in ("norm", "kernel", "convolved", "eps")}
    merged = {name: next((x for x in values if x is not None), None) for name, values in fields.items()}
    return _Term(what, **merged, nodes=frozenset([node]).union(*(part.nodes for part in known)))


def _convolution(node: Node, kernel: _Term | None) -> _Term | None:
    numbers = node.params["dimension_numbers"]
    if kernel is None or kernel.what != "kernel" or numbers.rhs_spec[0] != len(numbers.rhs_spec) - 1:
        return None  # a fold needs the output channels on the kernel's last axis
    return _Term("x", kernel=kernel.kernel, convolved=node.outputs[0])


def _kept(node: Node, part: _Term) -> _Term | None:
    """The same numbers in another dtype or shape."""
    [value] = node.outputs
    if part.what not in ("kernel", "x"):
        return dataclasses.replace(part, nodes=part.nodes | {node})
    if node.name in _CASTING:
        return dataclasses.replace(part, convolved=value) if part.what == "x" else part
    return None
