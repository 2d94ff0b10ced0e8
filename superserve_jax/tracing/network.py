"""A module as a SuperNet's network: its search space, its sizes, its programs and its numbers of parameters and products.

The module is traced once for every shape and dtype of its inputs and parameters, in inference and, if it has norms with
statistics, in training. All traces must agree on the axes that are elastic.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from superserve_jax import errors, layers, ops
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.tracing import kernels, products, statistics
from superserve_jax.tracing.dims import Dim, leaves
from superserve_jax.tracing.found import ElasticAxis, Found, axes_of, stages_of
from superserve_jax.tracing.graph import Value
from superserve_jax.tracing.modules import Source
from superserve_jax.tracing.options import Options
from superserve_jax.tracing.sizes import Sizes, positions
from superserve_jax.tracing.traced import Traced
from superserve_jax.tracing.traces import Traces

_BATCH = 2  # of the trace that decides what is elastic
_DEPTH = "depth "
_UNSEEN = "it is called in inference, but not in training"


class Network:
    """A traced module. Threads may share it.

    Args:
      source: the module.
      spec: shape and dtype of an input, with any batch size.
      options: what is elastic.

    Raises:
      ConfigError: the module cannot be traced with such an input, its output is not one array (B, classes), or nothing is
        elastic.
    """

    def __init__(self, source: Source, spec: jax.ShapeDtypeStruct, options: Options):
        self.source, self.options = source, options
        self._spec = spec
        paths = {path: options.method for group in source.lists.values() for path in group}
        make = functools.partial(source.function, paths=paths)
        self._traces = {
            (training, dtype): Traces(make(training=training, dtype=dtype), has_updates=training)
            for training in (False, True)
            for dtype in (None, "bfloat16", "float16")
        }
        self.found = self._analyse()

    # -- what was found -------------------------------------------------------------------------------------------------

    def _analyse(self) -> Found:
        spec = self.input_spec(_BATCH)
        traces = [self.traced(spec)]
        read = products.read_values(traces[0], {})
        self.norms = tuple(n for n in self.source.norms if traces[0].parameters[f"{n}.mean"] in read)
        if self.norms:
            traces.append(self.traced(spec, training=True))
            statistics.check(traces[-1], sorted(self.source.statistics), self.norms)
        self.num_classes = self._check_output(traces[0])
        reasons = [{path: block.reason for path, block in traced.blocks.items()} for traced in traces]
        merged = {path: next(filter(None, (r.get(path, _UNSEEN) for r in reasons)), None) for path in reasons[0]}
        stages, kept = stages_of(self.source.lists, merged)
        axes = axes_of(traces[0], stages)
        alike = [a for a in axes if all(a.group in t.groups and t.groups[a.group].places == a.places for t in traces)]
        of_training = [f for f in traces[-1].fixed if any(f.place in a.places for a in axes if a not in alike)]
        self.options.check_patterns(alike, stages)
        depths = [dataclasses.replace(s, depths=self.options.depths(s)) for s in stages]
        sized = self.options.sized(alike)
        suspects = {s for s in traces[0].suspects if set(s.groups) & {a.group for a in sized if a.is_elastic}}
        ordered = tuple(s for s in traces[0].suspects if s in suspects)
        total = sum(math.prod(s.shape) for s in self.source.specs.values())
        return Found(tuple(sized), tuple(depths), kept, (*traces[0].fixed, *of_training), ordered, total)

    def _check_output(self, traced: Traced) -> int:
        shapes = [tuple(dim.size for dim in operand.dims) for operand in traced.graph.outputs]
        if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != _BATCH:
            raise errors.ConfigError(
                f"for inputs of shape {self.input_spec(_BATCH).shape}, the module returns arrays of the shapes {shapes}; a "
                "SuperNet returns one array (batch, classes). Give `call`, such as call=lambda module, x: module(x)[0]"
            )
        return shapes[0][1]

    @functools.cached_property
    def elastic(self) -> tuple[ElasticAxis, ...]:
        """The axes that have several sizes."""
        return tuple(axis for axis in self.found.axes if axis.is_elastic)

    @functools.cached_property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that can be left out, in the order of the subnets' gates."""
        return tuple(block for stage in self.found.stages if len(stage.depths) > 1 for block in stage.blocks)

    @functools.cached_property
    def space(self) -> SearchSpace:
        """The search space. Choices are ratios of the whole sizes."""
        depths = tuple(stage.depths for stage in self.found.stages if len(stage.depths) > 1)
        axes = [
            Axis(
                name,
                tuple(tuple(size / axis.size for size in axis.sizes) for axis in group),
                tuple(self.blocks.index(axis.block or "") for axis in group) if group[0].block in self.blocks else None,
            )
            for name, group in self._positions.items()
        ]
        if not depths and not axes:
            raise errors.ConfigError(f"nothing of this module is elastic. This was found:\n{self.found}")
        return SearchSpace(depths, tuple(axes), rule=self.options.rule)  # pyright: ignore[reportArgumentType] - it was checked

    @functools.cached_property
    def _positions(self) -> dict[str, list[ElasticAxis]]:
        """The elastic axes with a choice of their own, by their names in the search space.

        A name has axes of blocks only, or axes outside of blocks only.

        At its usual place, an axis has the name of its kind: widths outside of blocks, all others inside. Elsewhere, the name
        ends in "_inside" or "_outside".
        """
        groups: dict[str, list[ElasticAxis]] = {}
        for axis in self.elastic:
            if axis.leader:
                continue
            place = "" if not self.blocks else "_inside" if axis.block in self.blocks else "_outside"
            usual = "_outside" if axis.kind == "width" else "_inside"
            groups.setdefault(axis.kind + (place if place != usual else ""), []).append(axis)
        return groups

    def sizes(self, subnet: Subnet) -> dict[str, int]:
        """The sizes of a subnet by name: a gate for each block, and the number of entries of each elastic axis."""
        sizes = {f"{_DEPTH}{block}": gate for block, gate in zip(self.blocks, subnet.gates, strict=True)}
        for name, group in self._positions.items():
            sizes |= {axis.name: round(ratio * axis.size) for axis, ratio in zip(group, subnet[name], strict=True)}
        leaders = {axis.name: axis for axis in self.elastic}
        for axis in self.elastic:
            if axis.leader:
                sizes[axis.name] = axis.sizes[leaders[axis.leader].sizes.index(sizes[axis.leader])]
        return sizes

    def subnet(self, sizes: Mapping[str, int]) -> Subnet:
        """The inverse of `sizes`. It takes no notice of sizes that follow others, and of axes that are not elastic."""
        gates = [sizes[f"{_DEPTH}{block}"] for block in self.blocks]
        ratios = {name: [sizes[axis.name] / axis.size for axis in group] for name, group in self._positions.items()}
        return self.space.subnet(gates=gates, **ratios)

    # -- tracing --------------------------------------------------------------------------------------------------------

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of inputs."""
        return jax.ShapeDtypeStruct((batch, *self._spec.shape[1:]), self._spec.dtype)

    def traced(self, inputs: Any, *, training: bool = False, dtypes: Mapping[str, Any] | None = None) -> Traced:
        """The trace for inputs like `inputs`, with parameters of other dtypes if they are given."""
        specs = {
            name: jax.ShapeDtypeStruct(s.shape, dtypes[name] if dtypes else s.dtype) for name, s in self.source.specs.items()
        }
        lower = {str(s.dtype) for name, s in specs.items() if s.dtype != self.source.specs[name].dtype}
        dtype = next(iter(lower & {"bfloat16", "float16"}), None)
        traced = self._traces[training, dtype].of({**specs, **self.source.statistics}, inputs)
        if hasattr(self, "found"):
            self._check_agreement(traced)
        return traced

    def _check_agreement(self, traced: Traced) -> None:
        for axis in self.elastic:
            if axis.group not in traced.groups or traced.groups[axis.group].places != axis.places:
                raise errors.ConfigError(
                    f"the axis '{axis.name}' can change for inputs of shape {self.input_spec(_BATCH).shape}, but not for the "
                    f"inputs now. Switch it off: axes={{{axis.name!r}: None}}"
                )

    def _chosen(self, sizes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sizes of groups and the gates of blocks, by the names that a trace has for them."""
        return {a.group: sizes[a.name] for a in self.elastic}, {b: sizes[f"{_DEPTH}{b}"] for b in self.blocks}

    def _leaves(self, sizes: Mapping[str, int]) -> dict[Dim, int]:
        leaf_of = self.reference.leaves
        return {leaf_of[axis.group]: sizes[axis.name] for axis in self.elastic}

    @functools.cached_property
    def reference(self) -> Traced:
        """The trace for one input, in inference."""
        return self.traced(self.input_spec(1))

    def _running(self, gates: Mapping[str, Any]) -> list[str]:
        """The norms that run if the blocks with gate 0 are left out."""
        read, values = products.read_values(self.reference, gates), self.reference.parameters
        return [norm for norm in self.norms if values[f"{norm}.mean"] in read]

    # -- running --------------------------------------------------------------------------------------------------------

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Any,
        sizes: Mapping[str, ops.Size],
        stats: layers.BatchStats | layers.StoredStats,
    ) -> jax.Array:
        """Logits (B, classes). The arguments are those of a family's module, see `FamilyConfig.create`."""
        training = isinstance(stats, layers.BatchStats)
        with_updates = training and bool(self.norms)
        dtypes = {name: x.dtype for name, x in params.items()}
        traced = self.traced(jax.ShapeDtypeStruct(inputs.shape, inputs.dtype), training=with_updates, dtypes=dtypes)
        groups, gates = self._chosen(sizes)
        limits = traced.sizes({name: ops.limit(size) for name, size in groups.items()})
        running = self._running(gates)
        folded = [norm for norm in running if isinstance(stats, layers.FoldedStats) and norm in stats.folded]
        rows: dict[str, Any] = {}
        for norm in self.source.norms:
            length = limits.limit(traced.parameters[f"{norm}.mean"].dims[0])
            mean, var = jnp.zeros(length), jnp.ones(length)
            if norm in running and norm not in folded and isinstance(stats, layers.StoredStats):
                mean, var = stats(norm, mean)
            rows |= {f"{norm}.mean": mean, f"{norm}.var": var}
        result, left = traced.run({**params, **rows}, inputs, groups, gates, folded=folded, skip=not training)
        if isinstance(stats, layers.BatchStats):
            output, new = result if with_updates else (result, {})
            stats.recorded |= {norm: (_float32(new[f"{norm}.mean"]), _float32(new[f"{norm}.var"])) for norm in running if new}
            elastic = {traced.leaves[axis.group] for axis in self.elastic}
            ends = [dim for path in left for dim in traced.blocks[path].left.dims]
            if not elastic.intersection(leaf for dim in ends for leaf in leaves(dim)):
                stats.hidden += [(_gate(gates[path]), left[path]) for path in self.blocks if path in left]
            return output
        return result

    # -- counting -------------------------------------------------------------------------------------------------------

    def norm_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The entries of each norm's statistics in a network of these sizes."""
        at = Sizes(self._leaves(sizes))
        values = self.reference.parameters
        return {n: at.limit(values[f"{n}.mean"].dims[0]) for n in self._running(self._chosen(sizes)[1])}

    def norm_entries(self, sizes: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, np.ndarray]:
        """For each norm of `norm_sizes(sizes)`, where its entries are among those of a network of sizes `limits`."""
        at = self._leaves(sizes), self._leaves(limits)
        values = self.reference.parameters
        return {n: positions(values[f"{n}.mean"].dims[0], *at) for n in self.norm_sizes(sizes)}

    def flops(self, sizes: Mapping[str, int]) -> int:
        """Multiply-adds of one input."""
        groups, gates = self._chosen(sizes)
        return products.multiply_adds(self.reference, self.reference.sizes(groups), gates)

    def shapes(self, sizes: Mapping[str, int], traced: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that a network of these sizes reads. The sizes in `traced` may become smaller."""
        (groups, gates), whole = self._chosen(sizes), self._whole(traced)
        at = self.reference.sizes(groups)
        read = products.read_values(self.reference, gates, whole)
        names = [name for name in self.source.specs if self.reference.parameters[name] in read]
        return {name: tuple(map(at.limit, self.reference.dims_of(name, whole))) for name in names}

    def cut(self, name: str, params: Mapping[str, Any], sizes: Mapping[str, int], traced: Collection[str] = ()) -> jax.Array:
        """A parameter of a network of these sizes. The sizes in `traced` may become smaller."""
        value = self.reference.parameters[name]
        at = Sizes(self._leaves(sizes))
        x = at.cut(jnp.asarray(params[name]), value.dims)
        if not self._is_small_kernel(value, traced):
            return x
        node = self.reference.selections[value]
        transforms = kernels.transforms(node, [params[source] for source in self.sources(name, traced)])
        return ops.kernel_select(x, transforms, at.limit(kernels.size_of(node)))

    def sources(self, name: str, traced: Collection[str] = ()) -> tuple[str, ...]:
        """The parameters of which `cut` makes one: itself, and the matrices of a kernel."""
        value = self.reference.parameters[name]
        if not self._is_small_kernel(value, traced):
            return (name,)
        names = {operand: name for name, operand in self.reference.parameters.items()}
        return tuple(names[operand] for operand in self.reference.selections[value].inputs if isinstance(operand, Value))

    def _is_small_kernel(self, value: Value, traced: Collection[str]) -> bool:
        """Whether a small network has a parameter in the size that `kernel_select` makes of it."""
        node = self.reference.selections.get(value)
        return node is not None and kernels.size_of(node) not in self._whole(traced)

    def _whole(self, traced: Collection[str]) -> set[Dim]:
        """The sizes of kernels that are traced. Their programs read the whole kernel and its matrices."""
        return {self.reference.leaves[axis.group] for axis in self.elastic if axis.steps and axis.name in traced}


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _gate(gate: ops.Size) -> jax.Array:
    return jnp.asarray(gate if isinstance(gate, int) else gate[1])
