"""The three programs that one forward function gives: sliced, masked and bucketed.

A program runs some subnets. Its envelope is a subnet that covers all of them: at least as large in every size. Sizes in which
one of them differs from the envelope are traced. All other sizes are static:

- `sliced(config, subnet)`: one subnet. Nothing is traced, so this is the fast program.
- `masked(config)`: all subnets. The envelope is the whole network. One compilation runs every subnet.
- `bucketed(config, subnets)`: the given subnets, which form a subnet bucket.

A program's functions are pure and take the parameters as a flat dict `{path: array}`. Jit or lower them as you need.
`used_leaves` finds out from the traced program which of the parameters it reads.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from superserve_jax import layers, ops
from superserve_jax.subnet import Subnet, envelope_of
from superserve_jax.supernets.family import FamilyConfig, Fold, FoldableConfig, TracedConfig

Params = Mapping[str, jax.Array]
Shape = tuple[int, ...]
Hidden = tuple[tuple[jax.Array, jax.Array], ...]
"""For each block of the whole network: a scalar (1 if the subnet keeps the block, else 0), and the block's output."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A forward function for a set of subnets.

    Args:
      config: the family's config.
      envelope: a subnet that covers all of these subnets.
      traced: names of the sizes in which these subnets differ from the envelope.
    """

    config: FamilyConfig
    envelope: Subnet
    traced: tuple[str, ...]

    @functools.cached_property
    def limits(self) -> dict[str, int]:
        """The envelope's sizes."""
        return self.config.sizes(self.envelope)

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where the channels of each norm begin in the statistics of this program."""
        norm_sizes = self.config.norm_sizes(self.limits)
        return dict(zip(norm_sizes, itertools.accumulate(norm_sizes.values(), initial=0), strict=False))

    @functools.cached_property
    def statistics_size(self) -> int:
        """N: the statistics of this program have the shape (2, N)."""
        return sum(self.config.norm_sizes(self.limits).values())

    @functools.cached_property
    def folds(self) -> dict[str, Fold]:
        """The norms that this program runs and that can be folded into a convolution, by name."""
        found = self.config.folds() if isinstance(self.config, FoldableConfig) else []
        return {fold.norm: fold for fold in found if fold.norm in self.offsets}

    @functools.cached_property
    def folded_params(self) -> frozenset[str]:
        """The parameters that folding changes: dotted paths of the kernels and biases of `folds`."""
        return frozenset(path for fold in self.folds.values() for path in (fold.kernel, fold.bias))

    # -- the arguments of a subnet, on the host -------------------------------------------------------------------------

    def active(self, subnet: Subnet) -> np.ndarray:
        """The traced sizes of a subnet, int32 of shape (number of traced sizes,)."""
        sizes = self.config.sizes(subnet)
        return np.array([sizes[name] for name in self.traced], np.int32)

    def pad_statistics(self, statistics: np.ndarray, subnet: Subnet) -> np.ndarray:
        """Pads a subnet's statistics (2, n) to this program's (2, N), with mean 0 and variance 1 at inactive channels."""
        if subnet == self.envelope:
            return statistics
        padded = np.stack([np.zeros(self.statistics_size, np.float32), np.ones(self.statistics_size, np.float32)])
        padded[:, self._places(subnet)] = statistics
        return padded

    def cut_statistics(self, padded: np.ndarray, subnet: Subnet) -> np.ndarray:
        """The inverse of `pad_statistics`: cuts (2, N) to the statistics (2, n) of a subnet."""
        return padded[:, self._places(subnet)]

    def _places(self, subnet: Subnet) -> np.ndarray:
        """Where the statistics of a subnet are among those of this program, int (n,)."""
        sizes = self.config.sizes(subnet)
        if isinstance(self.config, TracedConfig):
            entries = self.config.norm_entries(sizes, self.limits)
        else:
            entries = {name: np.arange(n) for name, n in self.config.norm_sizes(sizes).items()}
        return np.concatenate([np.arange(0), *(self.offsets[name] + places for name, places in entries.items())])

    def cut(self, name: str, params: Params, shape: Shape) -> jax.Array:
        """The part of a parameter that this program reads. `shape` is its shape, as `used_leaves` gives it."""
        if isinstance(self.config, TracedConfig):
            return self.config.cut(name, params, self.limits, self.traced)
        return cut(params[name], shape)

    def sources(self, names: Iterable[str]) -> tuple[str, ...]:
        """The parameters of which `cut` makes those with these names."""
        if not isinstance(self.config, TracedConfig):
            return tuple(names)
        return tuple(dict.fromkeys(source for name in names for source in self.config.sources(name, self.traced)))

    # -- the functions to compile ---------------------------------------------------------------------------------------

    def infer(self, params: Params, inputs: jax.Array, statistics: jax.Array, active: jax.Array) -> jax.Array:
        """Logits (B, num_classes), normalised with statistics (2, N)."""
        return module(self.config, params)(inputs, self._sizes(active), layers.StoredStats(statistics, self.offsets))

    def infer_folded(self, params: Params, inputs: jax.Array, statistics: jax.Array, active: jax.Array) -> jax.Array:
        """Logits (B, num_classes), equal to `infer` up to rounding, with parameters from `fold`.

        Norms that are not folded read the statistics (2, N).
        """
        stats = layers.FoldedStats(statistics, self.offsets, self.folds)
        return module(self.config, params)(inputs, self._sizes(active), stats)

    def fold(self, params: Params, statistics: jax.Array) -> dict[str, jax.Array]:
        """The parameters of `infer_folded`: cut to what it reads, with the statistics (2, N) folded into kernels and biases.

        A caller may leave out parameters of other layers. Then they are also missing in the result.
        """
        shapes = used_leaves(self, folded=True)
        found = {name: self.cut(name, params, shape) for name, shape in shapes.items() if name in params}
        for norm, fold in self.folds.items():
            [n], start = shapes[fold.bias], self.offsets[norm]
            mean, var = statistics[:, start : start + n]
            kernel, scale, bias = found[fold.kernel], self.cut(fold.scale, params, (n,)), found[fold.bias]
            found[fold.kernel], found[fold.bias] = ops.fold_norm(kernel, mean, var, scale, bias, eps=fold.eps)
        return found

    def train(self, params: Params, inputs: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits (B, num_classes), normalised with the statistics of the batch, and these statistics (2, N)."""
        logits, stats = self.observe(params, inputs, active)
        if not self.offsets:
            return logits, jnp.zeros((2, 0), jnp.float32)
        parts = [jnp.stack(stats.recorded[name]) for name in self.offsets]
        return logits, jnp.concatenate(parts, axis=1)

    def train_hidden(self, params: Params, inputs: jax.Array, active: jax.Array) -> tuple[jax.Array, Hidden]:
        """Logits as from `train`, and the hidden states (see `Hidden`), which are empty if the family records none."""
        logits, stats = self.observe(params, inputs, active)
        return logits, tuple(stats.hidden)

    def observe(self, params: Params, inputs: jax.Array, active: jax.Array) -> tuple[jax.Array, layers.BatchStats]:
        """Logits as from `train`, and the `BatchStats` with everything that the network recorded."""
        stats = layers.BatchStats()
        return module(self.config, params)(inputs, self._sizes(active), stats), stats

    def _sizes(self, active: jax.Array) -> dict[str, ops.Size]:
        place = {name: i for i, name in enumerate(self.traced)}
        return {name: (size, active[place[name]]) if name in place else size for name, size in self.limits.items()}


def module(config: FamilyConfig, params: Params) -> nnx.Module:
    """The network with these parameters. A caller may leave out some that the network does not read."""
    graphdef, paths, specs = _structure(config)
    values = [(path, nnx.Param(params.get(name, specs[name]))) for name, path in paths.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


@functools.lru_cache(maxsize=16)
def _structure(config: FamilyConfig) -> tuple[Any, dict[str, tuple[Any, ...]], dict[str, jax.ShapeDtypeStruct]]:
    """A module's graph definition, and two dicts by dotted path: the parameters' paths and specs. Allocates no arrays."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.create(nnx.Rngs(0))))
    flat = {".".join(map(str, path)): (path, value) for path, value in nnx.to_flat_state(state)}
    paths = {name: path for name, (path, _) in flat.items()}
    return graphdef, paths, {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, (_, v) in flat.items()}


def initial_params(config: FamilyConfig, seed: int) -> dict[str, jax.Array]:
    """Freshly initialised parameters of maximum size, as {dotted path: array}."""
    flat = nnx.to_flat_state(nnx.state(config.create(nnx.Rngs(seed))))
    return {".".join(map(str, path)): value[...] for path, value in flat}


def param_spec(config: FamilyConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters, as {dotted path: spec}."""
    return dict(_structure(config)[2])


def sliced(config: FamilyConfig, subnet: Subnet) -> Program:
    """The program of one subnet: every size static."""
    return Program(config, subnet, ())


@functools.lru_cache(maxsize=16)
def masked(config: FamilyConfig) -> Program:
    """The program of all subnets: every elastic size traced."""
    space = config.space()
    low = space.smallest()
    if space.rule == "every_other":  # a subnet may name its kept blocks, so any gate may be off
        low = dataclasses.replace(low, gates=(0,) * space.num_blocks)
    return bucketed(config, [low, space.largest()])


def bucketed(config: FamilyConfig, members: Iterable[Subnet], *, envelope: Subnet | None = None) -> Program:
    """The program of a subnet bucket. It traces the sizes in which a member differs from the envelope.

    Args:
      members: the subnets of the bucket.
      envelope: a subnet that covers all members; if left out, the smallest one.
    """
    members = list(members)
    top = envelope or envelope_of(members)
    limits = config.sizes(top)
    sizes = [config.sizes(m) for m in members]
    return Program(config, top, tuple(name for name, limit in limits.items() if any(s[name] != limit for s in sizes)))


def weight_spec(param: jax.ShapeDtypeStruct | jax.Array, compute_dtype: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a parameter in a network that computes in `compute_dtype`.

    Matrices and kernels have that dtype. Vectors (scales, biases) stay float32, because they cost no time.
    """
    is_cast = len(param.shape) > 1 and jnp.issubdtype(param.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(param.shape, compute_dtype if is_cast else param.dtype)


def cast(params: Params, compute_dtype: str) -> dict[str, jax.Array]:
    """The parameters of a network that computes in `compute_dtype`, see `weight_spec`."""
    dtypes = {name: weight_spec(p, compute_dtype).dtype for name, p in params.items()}
    return {name: p if p.dtype == dtypes[name] else p.astype(dtypes[name]) for name, p in params.items()}


# -- which parameters a program reads -----------------------------------------------------------------------------------


def cut(value: jax.Array, shape: Shape) -> jax.Array:
    """`value[: shape[0], : shape[1], ...]`"""
    return jax.lax.slice(value, (0,) * value.ndim, shape)


@functools.lru_cache(maxsize=1024)
def used_leaves(program: Program, *, folded: bool = False) -> dict[str, Shape]:
    """The smallest shape that a program needs of each parameter that it reads. `folded` means `Program.infer_folded`.

    WeightSlice reads the first entries along every axis. So a program reads the same values from parameters that are cut to
    these shapes, and needs no change. The parts may be other entries in a traced family, see `Program.cut`.
    """
    spec = param_spec(program.config)
    if isinstance(program.config, TracedConfig):
        shapes = program.config.shapes(program.limits, program.traced)
        unread = {fold.scale for fold in program.folds.values()} if folded else set[str]()
        return {name: shapes[name] for name in sorted(shapes.keys() - unread)}
    statistics = jax.ShapeDtypeStruct((2, program.statistics_size), jnp.float32)
    active = jax.ShapeDtypeStruct((len(program.traced),), jnp.int32)
    infer = program.infer_folded if folded else program.infer
    jaxpr = jax.make_jaxpr(infer)(spec, program.config.input_spec(1), statistics, active).jaxpr
    return read_shapes(jaxpr, sorted(spec))


def read_shapes(jaxpr: Any, names: Sequence[str]) -> dict[str, Shape]:
    """The smallest shape that a jaxpr needs of each argument that it reads.

    Args:
      jaxpr: the jaxpr.
      names: names for its first arguments. Later arguments are ignored.
    """
    found = {}
    for name, variable in zip(names, jaxpr.invars, strict=False):
        if uses := list(_uses(jaxpr, variable)):
            found[name] = tuple(map(max, zip(*uses, strict=True)))
    return found


def _uses(jaxpr: Any, variable: Any) -> Iterator[Shape]:
    """For each use of a variable: how many entries are read along every axis, counted from the first entry."""
    for equation in jaxpr.eqns:
        places = [i for i, v in enumerate(equation.invars) if v is variable]
        if not places:
            continue
        if equation.primitive.name == "slice" and equation.params["strides"] is None:
            yield tuple(equation.params["limit_indices"])
        elif equation.primitive.name == "cond":  # its first argument is the index of the branch
            for place, branch in itertools.product(places, equation.params["branches"]):
                yield from _uses(branch.jaxpr, branch.jaxpr.invars[place - 1])  # type: ignore[attr-defined]
        elif equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            for place in places:
                yield from _uses(inner, inner.invars[place])
        else:
            yield tuple(variable.aval.shape)
    if any(v is variable for v in jaxpr.outvars):
        yield tuple(variable.aval.shape)
