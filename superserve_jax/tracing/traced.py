"""A function that was traced once and can run at other sizes."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from superserve_jax import errors, ops
from superserve_jax.tracing import blocks, folding, groups, infinities, jaxprs, kernels, means, places, relations, suspects
from superserve_jax.tracing.dims import Dim, fix, unify
from superserve_jax.tracing.evaluation import Evaluation
from superserve_jax.tracing.folding import Foldable
from superserve_jax.tracing.graph import Graph, Operand, Value
from superserve_jax.tracing.sizes import Sizes
from superserve_jax.tracing.suspects import Suspect


class Traced:
    """A function of parameters and inputs that can run at other sizes. `trace` makes it.

    - `groups`: {name: the axes of parameters that change together}.
    - `fixed`: axes of parameters that cannot change, and why.
    - `suspects`: numbers that may have been computed from a size, and do not follow it.
    - `blocks`: {path: the operations between two marks}, see `blocks.py`.
    - `selections`: {a parameter: the `kernel_select` that makes smaller kernels of it}, see `kernels.py`.
    - `foldable`: {the path of a norm: how it is folded into a convolution}, see `folding.py`.
    - `graph`, `parameters`: the program, and the values in it that are the parameters.

    Threads may share it.
    """

    def __init__(self, graph: Graph, parameters: Mapping[str, Value], trees: tuple[Any, Any, Any], updates: int):
        self.graph, self.parameters = graph, dict(parameters)
        self._params_tree, self._inputs_tree, self._outputs_tree = trees
        self._updates = updates  # the last outputs are new values of parameters
        self.selections = kernels.settle(graph, parameters)
        sizes = {value: kernels.size_of(node) for value, node in self.selections.items()}
        self.leaves, self.groups = groups.find(self.parameters, sizes)
        self.fixed = groups.fixed(self.parameters, sizes)
        self._means = means.find(graph)
        self._infinite = infinities.find(graph)
        self.blocks: dict[str, blocks.Block] = blocks.find(graph, graph.outputs[: len(graph.outputs) - updates])
        names = {leaf: name for name, leaf in self.leaves.items()}
        self.suspects: tuple[Suspect, ...] = suspects.find(graph, names, self._means.keys())

    @functools.cached_property
    def foldable(self) -> dict[str, Foldable]:
        """See the class."""
        return folding.find(self.graph, self.parameters)

    def evaluate(
        self,
        params: Any,
        inputs: Any,
        sizes: Mapping[str, ops.Size],
        gates: Mapping[str, ops.Size] | None = None,
        *,
        skip: bool = True,
    ) -> Any:
        """The function's result at other sizes. Can be jitted and differentiated. See `run` for the arguments."""
        return self.run(params, inputs, sizes, gates, skip=skip)[0]

    def run(
        self,
        params: Any,
        inputs: Any,
        sizes: Mapping[str, ops.Size],
        gates: Mapping[str, ops.Size] | None = None,
        *,
        folded: Collection[str] = (),
        skip: bool = True,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The function's result at other sizes, and the outputs of the blocks in `gates`.

        Args:
          params: the parameters of the whole network, or what `cut` makes of them at these sizes. One that is not read may be
            a jax.ShapeDtypeStruct.
          inputs: the inputs, of the traced shapes and dtypes.
          sizes: the size of each group, by its name: an int, or a pair of a limit and a traced int32. A group that is left out
            keeps its whole size.
          gates: 1 or 0 for each block, by its path, or a pair as in `ops.layer_select`. A block that is left out runs.
          folded: the norms of `foldable` that are folded: their kernels and biases are those of `ops.fold_norm`.
          skip: as in `ops.layer_select`.

        Returns:
          what the function returns. Updates have the limits as their sizes, with zeros beyond the active sizes.

        Raises:
          UnknownNameError: no group or block has this name, or no norm that can be folded.
          ConfigError: a size is not from 1 to the whole size.
          InputError: a parameter or an input has another shape or dtype, or another structure, than those traced.
        """
        for path in gates or {}:
            errors.check_name("block", path, self.blocks)
        chosen = {self.blocks[path]: gate for path, gate in (gates or {}).items()}
        for norm in folded:
            errors.check_name("norm that can be folded", norm, self.foldable)
        norms = [self.foldable[norm] for norm in folded]
        evaluation = Evaluation(self.sizes(sizes), self._means, self._infinite, chosen, folded=norms, skip=skip)
        given = self._checked(params, self._params_tree, "params")
        values = list(self.parameters.values())
        for name, x, value in zip(self.parameters, given, values, strict=True):
            small = tuple(map(evaluation.limit, self.dims_of(name)))
            _check_array(f"parameter '{name}'", x, value, (value.shape, evaluation.shape(value), small))
        arguments = self._checked(inputs, self._inputs_tree, "inputs")
        for i, (x, value) in enumerate(zip(arguments, self.graph.inputs[len(values) :], strict=True)):
            _check_array(f"input {i}", x, value, (value.shape,))
        whole = dict(zip(values, given, strict=True))
        zeros = [True] * len(arguments)  # the axes of inputs do not change
        outputs = evaluation.run_with(self.graph, whole, arguments, zeros)
        first = len(outputs) - self._updates
        for i, operand in enumerate(self.graph.outputs[first:], first):
            outputs[i] = evaluation.mask(outputs[i], operand, range(outputs[i].ndim), 0)
        return jax.tree.unflatten(self._outputs_tree, outputs), evaluation.left

    def dims_of(self, name: str, whole: Collection[Dim] = ()) -> list[Dim]:
        """The axes of a parameter in a small network. A kernel has a size of its own, unless this size is in `whole`."""
        node = self.selections.get(self.parameters[name])
        return (self.parameters[name] if node is None or kernels.size_of(node) in whole else node.outputs[0]).dims

    def cut(self, params: Any, sizes: Mapping[str, ops.Size]) -> Any:
        """The parameters of the smaller network: the whole network's, cut to the limits of `sizes`."""
        limits = self.sizes({name: size[0] if isinstance(size, tuple) else size for name, size in sizes.items()})
        given = self._checked(params, self._params_tree, "params")
        cut = [limits.cut(x, value.dims) for x, value in zip(given, self.parameters.values(), strict=True)]
        return jax.tree.unflatten(self._params_tree, cut)

    def sizes(self, sizes: Mapping[str, ops.Size]) -> Sizes:
        """The sizes of all leaves. `sizes` has the sizes of groups, by name."""
        found = {}
        for name, size in sizes.items():
            errors.check_name("group of axes", name, self.groups)
            whole, steps = self.groups[name].size, self.groups[name].steps
            limit = size[0] if isinstance(size, tuple) else size
            if not isinstance(limit, int | np.integer) or not 1 <= limit <= whole:
                raise errors.ConfigError(
                    f"the size of '{name}' is {size!r}; give an int from 1 to {whole}, or a pair of "
                    "such an int and a traced int32"
                )
            if steps and limit not in steps:
                raise errors.ConfigError(f"the size of the kernel '{name}' is {limit}; it can be one of {steps}")
            found[self.leaves[name]] = (int(limit), size[1]) if isinstance(size, tuple) else int(limit)
        return Sizes(found)

    def _checked(self, tree: Any, expected: Any, what: str) -> list[Any]:
        found, structure = jax.tree.flatten(tree)
        if structure != expected:
            raise errors.InputError(f"{what} have the structure {structure}; the function was traced with {expected}")
        return found


def _check_array(what: str, x: Any, value: Value, shapes: tuple[tuple[int, ...], ...]) -> None:
    if np.shape(x) not in shapes or x.dtype != value.dtype:
        raise errors.InputError(
            f"{what} has shape {np.shape(x)} and dtype {x.dtype}; the function was traced with {value.shape} and "
            f"{value.dtype}. Trace it again for other inputs"
        )


def trace(function: Callable[[Any, Any], Any], params: Any, inputs: Any, *, has_updates: bool = False) -> Traced:
    """Traces a function once, and finds out which axes of its parameters can change.

    Args:
      function: `function(params, inputs)`, a pure function whose shapes follow from those of its arguments.
      params: the parameters of the whole network, or their shapes and dtypes: a dict of arrays, also nested. The running
        statistics of a BatchNorm count as parameters.
      inputs: the inputs, or their shapes and dtypes: one array, or a dict or list of arrays.
      has_updates: the function returns a pair of its result and new values of some parameters, such as running statistics:
        a dict like `params`, with these parameters only. Axes of the result cannot change, but those of new values can.

    Raises:
      ConfigError: the function looks at the numbers of its arguments, for example in an `if`. Or a new value has another shape
        than its parameter.
      UnknownNameError: a new value has the name of no parameter.

    >>> import jax.numpy as jnp
    >>> def mlp(params, x):
    ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
    >>> params = {"w1": jnp.ones((2, 8)), "w2": jnp.ones((8, 3))}
    >>> traced = trace(mlp, params, jnp.ones((1, 2)))
    >>> traced.groups["w1[1]"].places
    (Place(parameter='w1', axis=1), Place(parameter='w2', axis=0))
    >>> traced.evaluate(params, jnp.ones((1, 2)), {"w1[1]": 4}).shape
    (1, 3)
    """
    flat, params_tree = jax.tree_util.tree_flatten_with_path(params)
    try:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(params, inputs)
    except jax.errors.ConcretizationTypeError as e:
        raise errors.ConfigError(
            f"the function looks at the numbers of its arguments at {places.of_error(e)}, but tracing knows only shapes; use "
            "jnp.where or lax.cond there"
        ) from e
    graph = jaxprs.graph_of(closed)
    names = [_name(path) for path, _ in flat]
    parameters = dict(zip(names, graph.inputs[: len(flat)], strict=True))
    for value in graph.inputs[len(flat) :]:
        _fix_all(value, "an input has this axis")
    relations.relate(graph)
    updates = jax.tree_util.tree_flatten_with_path(shapes[1])[0] if has_updates else []
    results = len(graph.outputs) - len(updates)
    for operand in graph.outputs[:results]:
        _fix_all(operand, "the result has this axis")
    for (path, _), operand in zip(updates, graph.outputs[results:], strict=True):
        _tie_update(_name(path), operand, parameters)
    trees = (params_tree, jax.tree.structure(inputs), jax.tree.structure(shapes))
    return Traced(graph, parameters, trees, len(updates))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _fix_all(operand: Operand, reason: str) -> None:
    for dim in operand.dims:
        fix(dim, reason)


def _tie_update(name: str, operand: Operand, parameters: Mapping[str, Value]) -> None:
    """A new value of a parameter has the parameter's axes."""
    errors.check_name("parameter with a new value", name, parameters)
    new, old = [dim.size for dim in operand.dims], list(parameters[name].shape)
    if new != old:
        raise errors.ConfigError(f"the new value of '{name}' has shape {new}; give it the parameter's shape, {old}")
    for a, b in zip(operand.dims, parameters[name].dims, strict=True):
        unify(a, b, f"the new value of '{name}'")
