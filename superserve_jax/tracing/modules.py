"""A Flax NNX module as a pure function of its parameters, which can be traced.

    source = Source(module, call=None)
    function = source.function(training=False, paths=("blocks.0", "blocks.1"), dtype=None)
    logits = function(params, inputs)           # params: {dotted path: array}

| state of the module | here |
|---|---|
| nnx.Param | a parameter |
| nnx.BatchStat | a parameter, too. In training, the function returns the statistics of the batch as its new values |
| all other variables (buffers, random keys) | constants of the program |

Dropout is off: random numbers depend on the shape, so a smaller network would drop other units.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from superserve_jax import errors
from superserve_jax.tracing import blocks
from superserve_jax.tracing.blocks import dotted, natural

Call = Callable[..., Any]
_FLAGS = {"train": True, "training": True, "is_training": True, "use_running_average": False, "inference": False}
"""Names of arguments that say whether a call trains: {name: its value in training}."""


class Source:
    """A module, split into its definition and its variables.

    Args:
      module: the module, or its shapes as `nnx.eval_shape` makes them. It is not changed.
      call: `call(module, inputs)` or `call(module, inputs, train)`. None calls `module(inputs)`, with an argument such as
        `train` if its `__call__` has one.

    Raises:
      ConfigError: the module is no nnx.Module, or needs several inputs, or has batch statistics that are not those of a norm
        over one axis.
    """

    def __init__(self, module: nnx.Module, call: Call | None = None):
        if not isinstance(module, nnx.Module):
            raise errors.ConfigError(f"expected a Flax NNX module, got {type(module).__name__}: {module!r:.100}")
        if call is None:
            _check_arguments(type(module))
        self._call = _with_train(call) if call is not None else functools.partial(_call_module, flags=_flags(type(module)))
        self._graphdef, params, statistics, self._others = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
        self._variables = [*nnx.to_flat_state(params), *nnx.to_flat_state(statistics)]
        self.values = {dotted(path): v.get_raw_value() for path, v in nnx.to_flat_state(params)}
        """The module's parameters, or their shapes: {dotted path: array}."""
        for name, value in self.values.items():
            if not hasattr(value, "shape"):
                raise errors.ConfigError(
                    f"'{name}' is an nnx.Param that holds a {type(value).__name__}; make each array an nnx.Param"
                )
        self.norms = _norms(nnx.to_flat_state(statistics))
        self.lists = _lists(module)
        """Lists of submodules of one class: {path of the list: paths of its elements}. See `_lists`."""

    @functools.cached_property
    def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters."""
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.values.items()}

    @functools.cached_property
    def statistics(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the means and variances of all norms: {"bn.mean": ..., "bn.var": ...}."""
        return {f"{n}.{kind}": jax.ShapeDtypeStruct(s, jnp.float32) for n, s in self.norms.items() for kind in ("mean", "var")}

    def function(self, *, training: bool, paths: Mapping[str, str], dtype: Any = None) -> Callable[[Any, Any], Any]:
        """`function(params, inputs)`, which returns the module's output. If `training`, also new statistics.

        Args:
          training: norms use the statistics of the batch.
          paths: the submodules to mark as blocks, and the methods by which they are called.
          dtype: the `dtype` of all layers that have none of their own. None leaves the layers as they are.
        """

        def function(params: Mapping[str, Any], inputs: Any) -> Any:
            module = self.module(params)
            _prepare(module, training=training, dtype=dtype)
            for method in dict.fromkeys(paths.values()):
                blocks.mark(module, {path for path in paths if paths[path] == method}, method)
            output = self._call(module, inputs, train=training)
            if not training:
                return output
            new = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
            return output, {dotted(path): v.get_raw_value() for path, v in new}

        return function

    def module(self, values: Mapping[str, Any]) -> nnx.Module:
        """A module with other parameters and statistics. Its own code may expect other shapes than they have."""
        # a copy keeps the variable's class
        given = [(path, variable.copy(values[dotted(path)])) for path, variable in self._variables]
        return nnx.merge(self._graphdef, nnx.from_flat_state(given), self._others, copy=True)

    def run(self, module: nnx.Module, inputs: Any) -> Any:
        """Calls a module that `module` returned, in inference."""
        _prepare(module, training=False, dtype=None)
        return self._call(module, inputs, train=False)


def _with_train(call: Call) -> Call:
    """`call` as a function that takes `train`."""
    if "train" in inspect.signature(call).parameters:
        return call
    return lambda module, inputs, *, train: call(module, inputs)


def _call_module(module: Any, inputs: Any, *, train: bool, flags: Collection[str]) -> Any:
    given = {name: _FLAGS[name] == train for name in flags if name in _FLAGS}
    return module(inputs, **given, **({"deterministic": True} if "deterministic" in flags else {}))


def _flags(kind: type) -> tuple[str, ...]:
    """The arguments of a class's `__call__` that say whether it trains."""
    names = inspect.signature(kind.__call__).parameters
    return tuple(name for name in (*_FLAGS, "deterministic") if name in names)


def _check_arguments(kind: type) -> None:
    """Raises ConfigError if a class's `__call__` needs more than the inputs and arguments such as `train`."""
    parameters = [*inspect.signature(kind.__call__).parameters.values()][1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inputs = [name for name in needed if name not in (*_FLAGS, "deterministic")]
    if len(inputs) > 1:
        raise errors.ConfigError(
            f"{kind.__name__}.__call__ needs the arguments {inputs}, but it is called with one array of inputs. Pack them "
            "into one array, and give `call`, such as call=lambda module, x: module(x[:, :6], x[:, 6:])"
        )


def _prepare(module: nnx.Module, *, training: bool, dtype: Any) -> None:
    """Switches dropout off, and lets norms use the statistics of the batch in training."""
    module.set_attributes(deterministic=True, use_running_average=not training, raise_if_not_found=False)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Dropout):
            layer.rate = 0.0
        elif isinstance(layer, nnx.MultiHeadAttention):
            layer.dropout_rate = 0.0
        elif training and hasattr(layer, "momentum") and isinstance(getattr(layer, "mean", None), nnx.BatchStat):
            layer.momentum = 0.0  # pyright: ignore - so that the new running statistics are those of the batch
        if dtype is not None and getattr(layer, "dtype", 0) is None:
            layer.dtype = dtype  # pyright: ignore[reportAttributeAccessIssue]


def _norms(statistics: Any) -> dict[str, tuple[int, ...]]:
    """{path of a norm: shape of its statistics}."""
    shapes = {dotted(path): tuple(v.shape) for path, v in statistics}
    owners = dict.fromkeys(path.rpartition(".")[0] for path in shapes)
    for path, shape in shapes.items():
        owner, _, kind = path.rpartition(".")
        if kind not in ("mean", "var") or not {f"{owner}.mean", f"{owner}.var"} <= shapes.keys():
            raise errors.ConfigError(
                f"'{path}' is an nnx.BatchStat, but only the mean and var of a norm such as nnx.BatchNorm are known; make it "
                "an nnx.Variable if it does not change in training"
            )
        if len(shape) != 1:
            raise errors.ConfigError(
                f"'{path}' has shape {shape}: statistics of stacked layers (nnx.scan, nnx.vmap) are not supported; use a list "
                "of layers, or a norm without running statistics"
            )
    return {owner: shapes[f"{owner}.mean"] for owner in sorted(owners, key=natural)}


def _lists(module: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Submodules of one class with neighbouring numbers: elements of lists, or attributes such as `layer1`, `layer2`."""
    numbered: dict[str, list[tuple[int, str, type]]] = {}
    for path, submodule in nnx.iter_modules(module):
        last = str(path[-1]) if path else ""
        stem = last.rstrip("0123456789")
        if stem != last:
            name = dotted((*path[:-1], stem)) if stem else dotted(path[:-1])
            numbered.setdefault(name, []).append((int(last[len(stem) :]), dotted(path), type(submodule)))
    found: dict[str, tuple[str, ...]] = {}
    for name, elements in numbered.items():
        runs: list[list[tuple[int, str, type]]] = []
        for element in sorted(elements, key=lambda e: e[0]):
            if runs and runs[-1][-1][2] is element[2]:
                runs[-1].append(element)
            else:
                runs.append([element])
        long = [run for run in runs if len(run) > 1]
        for run in long:
            whole = len(runs) == 1
            found[name if whole else f"{name}[{run[0][0]}:{run[-1][0] + 1}]"] = tuple(path for _, path, _ in run)
    return found
