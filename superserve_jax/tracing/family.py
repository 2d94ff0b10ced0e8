"""What a family gets from its traced module: all members of a family's config, and the network."""

import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from superserve_jax import errors, layers, ops
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import Fold, TracedConfig, Units
from superserve_jax.tracing.blocks import dotted
from superserve_jax.tracing.found import Found
from superserve_jax.tracing.modules import Call, Source
from superserve_jax.tracing.network import Network
from superserve_jax.tracing.options import Options
from superserve_jax.tracing.units import units_of


class ElasticConfig(TracedConfig):
    """The members of a family that follow from a traced module. `ss.elastic.family` adds them to a config's class.

    The class has `build(rngs)` and `input_spec(batch)`, and may have `call(module, inputs)` or `call(module, inputs, train)`.
    """

    call: ClassVar[Call | None] = None

    @property
    def options(self) -> Options:
        """What is elastic. The decorator replaces it; a config of this library may compute it from its fields."""
        return Options()

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, freshly initialised."""
        raise NotImplementedError

    @property
    def network(self) -> Network:
        """The traced module."""
        return _network(self)

    @property
    def found(self) -> Found:
        """What can change in the module, and what cannot and why."""
        return self.network.found

    @property
    def num_classes(self) -> int:
        """Size of the logits."""
        return self.network.num_classes

    @property
    def digest(self) -> str:
        """A digest of parameters, axes, blocks and norms. It does not see other changes of the code."""
        found = self.found
        shapes = {name: [list(s.shape), str(s.dtype)] for name, s in self.network.source.specs.items()}
        axes: list[list[Any]] = [[a.name, a.kind, a.block, list(a.sizes), list(map(str, a.places))] for a in found.axes]
        for line, axis in zip(axes, found.axes, strict=True):
            line += [f"follows {axis.leader}"] if axis.leader else []
            line += [list(axis.steps)] if axis.steps else []
        stages = [[s.name, list(s.blocks), list(s.depths)] for s in found.stages]
        content = json.dumps([shapes, axes, stages, list(self.network.norms)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def create(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network of maximum size, freshly initialised by `build`."""
        return ElasticModule(self, Source(self.build(rngs), self.call).values)

    def space(self) -> SearchSpace:
        """The search space. Choices are ratios of the whole sizes."""
        return self.network.space

    def sizes(self, subnet: Subnet, /) -> dict[str, int]:
        """The sizes of a subnet by name: a gate for each block, and the number of entries of each elastic axis."""
        return self.network.sizes(subnet)

    def norm_sizes(self, sizes: Mapping[str, int], /) -> dict[str, int]:
        """Channels of each norm with statistics that a subnet of these sizes runs."""
        return self.network.norm_sizes(sizes)

    def norm_entries(self, sizes: Mapping[str, int], limits: Mapping[str, int], /) -> Mapping[str, Any]:
        """For each norm of `norm_sizes(sizes)`, where its channels are among those of a network of sizes `limits`."""
        return self.network.norm_entries(sizes, limits)

    def flops(self, subnet: Subnet, /) -> int:
        """Multiply-adds of one input in matrix products and convolutions. Products with zero padding count."""
        return self.network.flops(self.sizes(subnet))

    def num_params(self, subnet: Subnet, /) -> int:
        """Number of weights that the subnet needs on its own, without statistics."""
        return sum(math.prod(shape) for shape in self.shapes(self.sizes(subnet)).values())

    def shapes(self, sizes: Mapping[str, int], traced: Collection[str] = (), /) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that a network of these sizes reads. The sizes in `traced` may become smaller."""
        return self.network.shapes(sizes, traced)

    def cut(
        self, name: str, params: Mapping[str, Any], sizes: Mapping[str, int], traced: Collection[str] = (), /
    ) -> jax.Array:
        """A parameter of a network of these sizes, made of the whole network's. The sizes in `traced` may become smaller."""
        return self.network.cut(name, params, sizes, traced)

    def sources(self, name: str, traced: Collection[str] = (), /) -> tuple[str, ...]:
        """The parameters of which `cut` makes one."""
        return self.network.sources(name, traced)

    def folds(self) -> list[Fold]:
        """The norms that engines may fold into the convolution before them."""
        return [foldable.fold for norm, foldable in self.network.reference.foldable.items() if norm in self.network.norms]

    def units(self) -> list[Units]:
        """The heads, neurons and channels that training may sort by importance."""
        return units_of(self.network)


@functools.lru_cache(maxsize=16)
def _network(config: ElasticConfig) -> Network:
    return Network(Source(_without_weights(config), config.call), config.input_spec(1), config.options)


def _without_weights(config: ElasticConfig) -> nnx.Module:
    """The config's module, with shapes in place of parameters and statistics, and with the numbers of all other arrays."""
    definitions = []

    def parts() -> tuple[nnx.State, nnx.State]:
        definition, weights, others = nnx.split(config.build(nnx.Rngs(0)), nnx.Any(nnx.Param, nnx.BatchStat), ...)
        definitions.append(definition)
        return weights, others

    weights, others = jax.eval_shape(parts)
    leaves = dict(nnx.to_flat_state(others))
    if leaves:
        with jax.ensure_compile_time_eval():  # the first use of a network may be inside of a jitted function
            # The compiler leaves out what only makes parameters.
            leaves |= nnx.to_flat_state(jax.jit(lambda: _numbers(parts()[1]))())
    for path, leaf in leaves.items():
        if _has_only_a_shape(leaf) and not isinstance(leaf, nnx.RngState):
            raise errors.ConfigError(
                f"'{dotted(path)}' has a shape, but no numbers. Only parameters may be without: make the module itself, not "
                f"nnx.eval_shape of it, or make '{dotted(path)}' an nnx.Param"
            )
    return nnx.merge(definitions[-1], weights, nnx.from_flat_state(list(leaves.items())))


def _numbers(state: nnx.State) -> nnx.State:
    """A state without arrays that have only a shape."""
    return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(state) if not _has_only_a_shape(leaf)])


def _has_only_a_shape(leaf: Any) -> bool:
    """Whether a variable, or an array that is an attribute without one, has no numbers."""
    return isinstance(leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf, jax.ShapeDtypeStruct)


class ElasticModule(nnx.Module):
    """The parameters of a traced module, under its own paths. It is called as the modules of all families are.

    Args:
      config: the family's config.
      values: the parameters, by dotted path.
    """

    def __init__(self, config: ElasticConfig, values: Mapping[str, Any]):
        self._config = config
        tree: dict[str, Any] = {}
        for path, value in values.items():
            *folders, last = path.split(".")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[last] = value
        for name, value in tree.items():
            setattr(self, name, _module(value))

    def __call__(self, inputs: Any, sizes: Mapping[str, ops.Size], stats: layers.BatchStats | layers.StoredStats) -> jax.Array:
        """Logits, float32 (B, classes)."""
        params = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(self, nnx.Param))}
        return self._config.network.run(params, inputs, sizes, stats).astype(jnp.float32)


def _module(value: Any) -> Any:
    return nnx.Dict({name: _module(inner) for name, inner in value.items()}) if isinstance(value, dict) else nnx.Param(value)
