"""A case: a plain model, the sizes of the whole network, and how a small network takes the parameters of a subnet."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Shapes = Mapping[str, tuple[int, ...] | None]
"""{dotted path: shape}, or None for a parameter of a dropped block."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A plain model, and small networks of the same code.

    Args:
      name: the name of the case.
      build: makes a network from a `Sizes` of the model and from `nnx.Rngs`.
      sizes: the whole network's `Sizes`.
      shrink: derives the `Sizes` of a small network from the shapes of a subnet's parameters.
      shape: the shape of one input, without the batch.
      dtype: the dtype of the inputs.
      vocab: number of tokens, if the inputs are int32 tokens.
      blocks: regular expressions that match the paths of blocks. The group is the block's number.
      options: keyword arguments of `ss.elastic`.
    """

    name: str
    build: Callable[[Any, nnx.Rngs], nnx.Module]
    sizes: Any
    shrink: Callable[[Shapes], Any]
    shape: tuple[int, ...]
    dtype: str = "float32"
    vocab: int = 0
    blocks: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *self.shape), self.dtype)

    def inputs(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        shape = (batch, *self.shape)
        if self.dtype == "float32":
            return rng.standard_normal(shape, np.float32)
        return rng.integers(0, self.vocab or 256, shape, self.dtype)

    def network(self, sizes: Any) -> nnx.Module:
        """A network with random values. It does not run the initialisers, which take seconds to compile.

        Biases, scales and tokens are random, too, because a missing mask does not show in zeros.
        """
        rng = np.random.default_rng(0)

        def value(path, spec):
            if jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key):
                return jax.random.key(0)
            if not jnp.issubdtype(spec.dtype, jnp.floating):
                return jnp.asarray(np.zeros(spec.shape, spec.dtype))
            around = 1 if {"scale", "weight", "var"} & set(path) else 0
            return jnp.asarray((around + 0.2 * rng.standard_normal(spec.shape)).astype(spec.dtype))

        graphdef, state = nnx.split(nnx.eval_shape(lambda: self.build(sizes, nnx.Rngs(0))))
        flat = [(path, variable.replace(value(path, variable.get_value()))) for path, variable in nnx.to_flat_state(state)]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    def small_paths(self, params: Mapping[str, Any]) -> dict[str, str]:
        """{path in the whole network: path in the small one} of a subnet's parameters. Kept blocks get new numbers."""
        found = {path: path for path, value in params.items() if value is not None}
        for pattern in self.blocks:
            numbers = kept(params, pattern)
            for path in found:
                if match := re.match(pattern, path):
                    start, end = match.span(1)
                    found[path] = path[:start] + str(numbers.index(int(match[1]))) + path[end:]
        return found

    def load(self, module: nnx.Module, params: Mapping[str, Any]) -> None:
        """Gives a small network the parameters of a subnet, {path in the whole network: array or None}."""
        values = {small: params[path] for path, small in self.small_paths(params).items()}
        shapes = {path: value.shape for path, value in params_of(module).items()}
        assert shapes == {path: value.shape for path, value in values.items()}
        flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
        nnx.update(module, nnx.from_flat_state([(path, values[dotted(path)]) for path, _ in flat]))


def dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def params_of(module: nnx.Module) -> dict[str, Any]:
    """{dotted path: array, or shape and dtype} of all `nnx.Param` of a module."""
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def kept(params: Mapping[str, Any], pattern: str) -> list[int]:
    """The numbers of the blocks whose parameters are not None."""
    matches = [re.match(pattern, path) for path, value in params.items() if value is not None]
    return sorted({int(match[1]) for match in matches if match})


def sizes_of(shapes: Shapes, template: str, numbers: Sequence[int], axis: int) -> tuple[int, ...]:
    """The length of one axis in every kept block, for example with the template "blocks.{}.up.kernel"."""
    found = [shapes[template.format(number)] for number in numbers]
    return tuple(shape[axis] for shape in found if shape is not None)
