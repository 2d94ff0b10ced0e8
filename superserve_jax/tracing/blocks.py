"""Blocks that a smaller network may leave out: marks them while a module is traced, and finds them in the graph.

A block is a call of a submodule, such as one layer of a transformer. While its module is traced, its first array and its
output carry `name` operations, which compute nothing. So the operations between the two are the block.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from superserve_jax.tracing.dims import resolve
from superserve_jax.tracing.graph import Graph, Node, Value, all_graphs, all_nodes

_ENTER, _EXIT = "superserve enters ", "superserve leaves "
_PATH = "superserve_path"  # an attribute of marked submodules
_MIXING = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The operations of one call of a submodule.

    Args:
      path: the submodule's path, such as "blocks.0".
      graph: the graph that holds the operations.
      start, stop: the numbers of the first and the last operation among the graph's nodes. Both are marks.
      reason: why a smaller network cannot leave the block out, or None if it can.
    """

    path: str
    graph: Graph
    start: int
    stop: int
    reason: str | None

    @property
    def nodes(self) -> list[Node]:
        """The operations."""
        return self.graph.nodes[self.start : self.stop + 1]

    @property
    def entered(self) -> Any:
        """The block's input: the operand of its first mark."""
        return self.graph.nodes[self.start].inputs[0]

    @property
    def left(self) -> Value:
        """The block's output: what its last mark returns."""
        return self.graph.nodes[self.stop].outputs[0]


def mark(module: nnx.Module, paths: Collection[str], method: str = "__call__") -> None:
    """Marks the calls of submodules, for the time in which `module` is traced.

    The submodules' classes become subclasses of their own. So `module` must be a copy that nobody else uses.

    Args:
      module: the module that will be traced.
      paths: dotted paths of its submodules.
      method: the method by which the module calls them.
    """
    for path, submodule in nnx.iter_modules(module):
        name = dotted(path)
        if name in paths and callable(getattr(type(submodule), method, None)):
            object.__setattr__(submodule, "__class__", _marked_class(type(submodule), method))
            setattr(submodule, _PATH, name)


@functools.cache
def _marked_class(kind: type, method: str) -> type:
    call = getattr(kind, method)

    @functools.wraps(call)
    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(enumerate(args)), **kwargs}
        first = next((key for key, x in given.items() if isinstance(x, jax.Array)), None)
        if first is None:
            return call(self, *args, **kwargs)
        path = getattr(self, _PATH)
        given[first] = entered = checkpoint_name(given[first], _ENTER + path)
        result = call(self, *(given[i] for i in range(len(args))), **{name: given[name] for name in kwargs})
        outputs, tree = jax.tree.flatten(result)
        alike = [i for i, y in enumerate(outputs) if isinstance(y, jax.Array) and _is_like(y, entered)]
        if alike:
            outputs[alike[0]] = checkpoint_name(outputs[alike[0]], _EXIT + path)
        return jax.tree.unflatten(tree, outputs)

    body = {method: marked, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body)


def _is_like(y: jax.Array, x: jax.Array) -> bool:
    return y.shape == x.shape and y.dtype == x.dtype


def dotted(path: Sequence[Any]) -> str:
    """A path as text.

    >>> dotted(("blocks", 0, "fc1"))
    'blocks.0.fc1'
    """
    return ".".join(map(str, path))


def find(graph: Graph, results: Collection[Any]) -> dict[str, Block]:
    """The marked blocks of a related graph, by path.

    Args:
      graph: the graph.
      results: the outputs of the graph that count as used. New values of statistics do not count.
    """
    found: dict[str, list[Block]] = {}
    for inner in all_graphs(graph):
        users = _users(inner, results if inner is graph else inner.outputs)
        made = {value: i for i, node in enumerate(inner.nodes) for value in node.outputs}
        for path, start, stop in _spans(inner):
            block = Block(path, inner, start, stop, None)
            found.setdefault(path, []).append(dataclasses.replace(block, reason=_reason(block, users, made)))
    twice = "it is called more than once"
    return {
        path: found[path][0] if len(found[path]) == 1 else dataclasses.replace(found[path][0], reason=twice)
        for path in sorted(found, key=natural)
    }


def natural(path: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts "blocks.2" before "blocks.10"."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _spans(graph: Graph) -> Iterator[tuple[str, int, int]]:
    entered: list[tuple[str, int]] = []
    for i, node in enumerate(graph.nodes):
        name = str(node.params.get("name", "")) if node.name == "name" else ""
        if name.startswith(_ENTER):
            entered.append((name.removeprefix(_ENTER), i))
        elif name.startswith(_EXIT):
            path = name.removeprefix(_EXIT)
            while entered and entered[-1][0] != path:  # a block whose output has another shape has no exit
                entered.pop()
            if entered:
                yield path, entered.pop()[1], i


def _users(graph: Graph, results: Collection[Any]) -> dict[Any, float]:
    """For each value, the number of the last node that reads it. Infinity for results."""
    last: dict[Any, float] = {}
    for i, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.inputs, float(i)))
    last.update(dict.fromkeys(results, float("inf")))
    return last


def _reason(block: Block, last: Mapping[Any, float], made_by: Mapping[Any, int]) -> str | None:
    """Why a smaller network cannot leave the block out.

    Args:
      block: the block.
      last: for each value, the number of the last node that reads it.
      made_by: for each value, the number of the node that makes it. Inputs of the graph are left out.
    """
    if not _reaches(block, block.entered):
        return "its output is not added to its input, so without it the network would compute something else"
    others = {value for node in block.nodes for value in node.inputs if isinstance(value, Value)}
    since = range(made_by.get(block.entered, -1) + 1, block.start)
    if any(made_by.get(value) in since and _reaches(block, value) for value in others):
        return "its output is also added to another argument than its first one, so it is unknown which of them would remain"
    made = {value for node in block.nodes for value in node.outputs} - {block.left}
    if any(last.get(value, -1) > block.stop for value in made):
        return "more than its first output is used later"
    inner = [node for node in block.nodes for node in (node, *(n for body in node.bodies for n in all_nodes(body)))]
    if not any(node.name in _MIXING for node in inner):
        return "it has no matrix product or convolution"
    return None


def _reaches(block: Block, value: Value) -> bool:
    """Whether a value has the axes of the block's output, and reaches it without a matrix product or convolution."""
    before, after = ([resolve(dim) for dim in v.dims] for v in (value, block.left))
    is_same = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True) if a.size != 1)
    return is_same and value.shape == block.left.shape and block.left in _carriers(block.nodes, {value})


def _carriers(nodes: Sequence[Node], start: Collection[Any]) -> set[Any]:
    """The values that some values reach without a matrix product or convolution, such as `x + f(x)` from x."""
    found = set(start)
    for node in nodes:
        reached = [value in found for value in node.inputs]
        if node.name in _MIXING or not any(reached):
            continue
        carried = [True] * len(node.outputs)
        for body in node.bodies if node.name == "cond" else node.bodies[:1]:  # the other bodies are derivatives
            first = len(reached) - len(body.inputs)  # the index of a branch is no argument
            arguments = {v for v, is_reached in zip(body.inputs, reached[first:], strict=True) if is_reached}
            inner = _carriers(body.nodes, arguments)
            carried = [was and value in inner for was, value in zip(carried, body.outputs, strict=True)]
        found.update(value for value, is_carried in zip(node.outputs, carried, strict=True) if is_carried)
    return found
