"""What a group of axes is used for: its kind.

| kind | axis |
|---|---|
| heads | a batch axis of a product of two activations, as in attention. Or heads of queries that share a head of keys |
| head_dim | another axis of such a product: the features of queries, keys and values |
| width | a residual stream: an activation that sums the results of several layers |
| kernel | the size of a convolution's kernel, see `kernels.py` |
| expand | any other axis inside of the network, such as the hidden units of an MLP |

An activation is a value that depends on the input. A weight depends on parameters only.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from superserve_jax.tracing.dims import Dim, leaves
from superserve_jax.tracing.graph import Graph, Node, Operand, Value
from superserve_jax.tracing.rules.calls import scan_counts

KINDS = ("heads", "head_dim", "width", "expand", "kernel")
_LOOKUPS = ("gather", "dynamic_slice", "take")


@dataclasses.dataclass
class Uses:
    """What the operations of a graph do with the leaves of its axes.

    `heads`, `head_dim` and `width` hold leaves of these kinds. `summed` holds leaves over which a product or a reduction sums.
    `read` has, for each parameter, the leaves over which a product of this parameter with an activation sums.

    `scores` has, for each product of two activations such as queries times keys, the axes that only one of them has. If one of
    these is summed over in a product with values, `shared` holds all others: tokens, and heads of queries that share a head of
    keys. A layer reads the heads, but not the tokens.
    """

    heads: set[Dim] = dataclasses.field(default_factory=set)
    head_dim: set[Dim] = dataclasses.field(default_factory=set)
    width: set[Dim] = dataclasses.field(default_factory=set)
    summed: set[Dim] = dataclasses.field(default_factory=set)
    read: dict[str, set[Dim]] = dataclasses.field(default_factory=dict)
    scores: dict[object, set[Dim]] = dataclasses.field(default_factory=dict)
    shared: set[Dim] = dataclasses.field(default_factory=set)

    def kind(self, leaf: Dim) -> str:
        """The kind of a leaf."""
        if leaf.steps:
            return "kernel"
        if leaf in self.shared and any(leaf in read for read in self.read.values()):
            return "heads"
        return next((kind for kind in KINDS[:3] if leaf in getattr(self, kind)), "expand")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a value comes from.

    Args:
      parameters: the parameters that it depends on.
      makers: the last products that it was made by. Empty for a weight, and for a value that no product has made.
      is_weight: whether it depends on parameters only.
    """

    parameters: frozenset[str] = frozenset()
    makers: frozenset[object] = frozenset()
    is_weight: bool = True


def uses(graph: Graph, parameters: Mapping[str, Value]) -> Uses:
    """What a related graph does with the leaves of its axes.

    Args:
      graph: the graph.
      parameters: which of its inputs are parameters, by name. All others are activations.
    """
    found = Uses()
    names = {value: name for name, value in parameters.items()}
    sources = [_Source(frozenset([names[v]])) if v in names else _Source(is_weight=False) for v in graph.inputs]
    _visit(graph, sources, found)
    return found


def _visit(graph: Graph, sources: Sequence[_Source], found: Uses) -> list[_Source]:
    """Fills `found`. Returns the sources of the graph's outputs."""
    known = dict(zip(graph.inputs, sources, strict=True))

    def of(operand: Operand) -> _Source:
        return known.get(operand, _Source()) if isinstance(operand, Value) else _Source()

    for node in graph.nodes:
        given = [of(operand) for operand in node.inputs]
        if node.name == "cond":
            branches = [_visit(body, given[1:], found) for body in node.bodies]
            outputs = [_merged(sources) for sources in zip(*branches, strict=True)]
        elif node.bodies:
            if node.name == "scan":  # what is carried may be a residual stream
                first, count = scan_counts(node)
                for i in range(first, first + count):
                    given[i] = dataclasses.replace(given[i], makers=given[i].makers | {(node, i)}, is_weight=False)
            outputs = _visit(node.bodies[0], given, found)
        else:
            outputs = [_result(node, given, found)] * len(node.outputs)
        known.update(zip(node.outputs, outputs, strict=True))
    return [of(operand) for operand in graph.outputs]


def _merged(sources: Sequence[_Source]) -> _Source:
    """The source of a value that is one of several."""
    parameters = frozenset[str]().union(*(source.parameters for source in sources))
    makers = frozenset[object]().union(*(source.makers for source in sources))
    return _Source(parameters, makers, is_weight=False)


def _result(node: Node, given: Sequence[_Source], found: Uses) -> _Source:
    is_weight = all(source.is_weight for source in given)
    parameters = frozenset[str]().union(*(source.parameters for source in given))
    makers = frozenset[object]().union(*(source.makers for source in given))
    if node.name in ("dot_general", "conv_general_dilated"):
        _product(node, given, found)
        makers = frozenset([node])
    elif node.name in _LOOKUPS and given[0].is_weight and not is_weight:
        makers = frozenset([node])
    elif node.name.startswith("reduce_") and "axes" in node.params and node.inputs[0].dims:
        found.summed.update(_leaves(node.inputs[0].dims[axis] for axis in node.params["axes"]))
    elif node.name in ("add", "add_any") and all(source.makers for source in given) and given[0].makers != given[1].makers:
        found.width.update(_leaves(node.outputs[0].dims))
    return _Source(parameters, frozenset() if is_weight else makers, is_weight)


def _product(node: Node, given: Sequence[_Source], found: Uses) -> None:
    numbers = node.params["dimension_numbers"]
    a, b = (operand.dims for operand in node.inputs)
    if node.name == "conv_general_dilated":
        summed, batch = [b[axis] for axis in numbers.rhs_spec[1:]], []
    else:
        (contract_a, _), (batch_a, _) = numbers
        summed, batch = [a[axis] for axis in contract_a], [a[axis] for axis in batch_a]
    found.summed.update(_leaves(summed))
    for source, other in (given, given[::-1]):
        if source.is_weight and not other.is_weight:
            for name in source.parameters:
                found.read.setdefault(name, set()).update(_leaves(summed))
    if not any(source.is_weight for source in given):
        heads = set(_leaves(batch))
        found.heads.update(heads)
        found.head_dim.update(leaf for leaf in _leaves([*a, *b]) if leaf not in heads)
        inner = {leaf for leaf in _leaves(summed) if leaf.size > 1}
        if inner and all(leaf.fixed for leaf in inner):  # over tokens, not over features
            for source, operand in zip(given, node.inputs, strict=True):
                if any(inner <= found.scores.get(maker, set()) for maker in source.makers):
                    found.shared.update(_leaves(operand.dims))
        if inner:
            found.scores[node] = {*_leaves([*a, *b])} - heads - inner


def _leaves(dims: Iterable[Dim]) -> list[Dim]:
    return [leaf for dim in dims for leaf in leaves(dim)]
