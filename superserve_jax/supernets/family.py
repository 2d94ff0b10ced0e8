"""What a family of SuperNets must offer: the interface of its config.

A family is one frozen dataclass, the config, that describes a network and its search space. `FamilyConfig` lists what every
family offers. The other Protocols are optional parts. Test for a part with `isinstance(config, SequenceConfig)`.
`supernets.check` verifies a new family; `families/ofa_resnet.py` is the example to follow.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from superserve_jax import ops
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.vocabulary import TokenConfig


@runtime_checkable
class FamilyConfig(Protocol):
    """The config of a family: a frozen dataclass, so it is hashable and two equal configs describe equal networks."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: ClassVar[str]
    """The name of the family, as exports and runs store it."""

    @property
    def num_classes(self) -> int:
        """Size of the logits."""
        ...

    def create(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network of maximum size, freshly initialised, called as `module(inputs, sizes, stats)`.

        `inputs` has the shape and dtype of `input_spec`. `sizes` has the names of `sizes(subnet)`; each value is an
        `ops.Size`. `stats` is a `layers.BatchStats` or a `layers.StoredStats`. The call returns logits (B, num_classes).
        """
        ...

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape (batch, ...) and dtype of raw inputs."""
        ...

    def space(self) -> SearchSpace:
        """The search space."""
        ...

    def sizes(self, subnet: Subnet, /) -> dict[str, int]:
        """The active sizes of a subnet by name: channels as ints, and a gate (0 or 1) for each block."""
        ...

    def norm_sizes(self, sizes: dict[str, int], /) -> dict[str, int]:
        """Channels of each SubnetNorm that a subnet of these sizes runs, by name, in the order of its statistics."""
        ...

    def flops(self, subnet: Subnet, /) -> int:
        """Multiply-adds of one input in matrix products and convolutions. Products with zero padding count."""
        ...

    def num_params(self, subnet: Subnet, /) -> int:
        """Number of weights that the subnet needs on its own, without statistics."""
        ...


class UnitAxis(NamedTuple):
    """An axis of a parameter that holds units.

    `path` is the parameter's dotted path, and `axis` the number of the axis. Row i of `entries`, an int array (count, n), has
    the places of unit i along the axis. None means that the units follow each other, each with length / count entries.
    """

    path: str
    axis: int
    entries: np.ndarray | None = None

    def places(self, count: int, length: int) -> np.ndarray:
        """The places of each of `count` units along the axis of this length, int (count, n).

        >>> UnitAxis("kernel", 0).places(2, 6).tolist()
        [[0, 1, 2], [3, 4, 5]]
        """
        return np.arange(length).reshape(count, -1) if self.entries is None else self.entries


@dataclasses.dataclass(frozen=True)
class Units:
    """Units of one layer: what its elastic width counts, such as heads, neurons or channels. A subnet runs the first units.

    If all their parameters move with them, reordering them does not change the whole network's output.

    Args:
      count: number of units.
      writers: the axes of all parameters that produce the units.
      readers: the axes of all weights that the units are multiplied with next.
    """

    count: int
    writers: tuple[UnitAxis, ...]
    readers: tuple[UnitAxis, ...]


@runtime_checkable
class RewirableConfig(FamilyConfig, Protocol):
    """A family whose units (heads, neurons, channels) training can sort by importance."""

    def units(self) -> list[Units]:
        """The units that training may reorder."""
        ...


@dataclasses.dataclass(frozen=True)
class Fold:
    """A SubnetNorm that reads only the output of one convolution. So both can become one convolution with a bias.

    Args:
      norm: the norm's name, as in `norm_sizes`.
      kernel: dotted path of the convolution's kernel. Its last axis is the output channels. No other layer reads it.
      scale: dotted path of the norm's scale.
      bias: dotted path of the norm's bias.
      eps: what the norm adds to a variance.
    """

    norm: str
    kernel: str
    scale: str
    bias: str
    eps: float = ops.EPS


@runtime_checkable
class FoldableConfig(FamilyConfig, Protocol):
    """A family with norms that can be folded into the convolutions before them. Engines do that on GPUs."""

    def folds(self) -> list[Fold]:
        """All norms that may be folded, each at most once."""
        ...


@runtime_checkable
class CountedConfig(FamilyConfig, Protocol):
    """A family that counts the weights in vectors, which stay float32 in a network that computes in bfloat16.

    Without it, they are found by tracing a program of each subnet, which takes a fifth of a second.
    """

    def num_vector_params(self, subnet: Subnet, /) -> int:
        """How many of `num_params(subnet)` are in vectors, such as biases and the scales of norms."""
        ...


@runtime_checkable
class TracedConfig(FamilyConfig, Protocol):
    """A family whose network follows from traced code. Its subnets may read other entries than the first ones of an axis."""

    @property
    def digest(self) -> str:
        """A digest of what tracing found. Runs and exports keep it, so that code of another structure does not read them."""
        ...

    def shapes(self, sizes: dict[str, int], traced: Collection[str] = (), /) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that a network of these sizes reads, by dotted path.

        `traced` names sizes that are limits: the network may run at smaller ones.
        """
        ...

    def cut(self, name: str, params: Mapping[str, Any], sizes: dict[str, int], traced: Collection[str] = (), /) -> jax.Array:
        """What a network of these sizes reads of a parameter. The network also accepts this part alone.

        `params` holds the whole network's parameters. `traced` is that of `shapes`.
        """
        ...

    def sources(self, name: str, traced: Collection[str] = (), /) -> tuple[str, ...]:
        """The parameters of which `cut` makes one."""
        ...

    def norm_entries(self, sizes: dict[str, int], limits: dict[str, int], /) -> Mapping[str, np.ndarray]:
        """For each norm of `norm_sizes(sizes)`, where its channels are among those of a network of sizes `limits`."""
        ...


@runtime_checkable
class SequenceConfig(FamilyConfig, TokenConfig, Protocol):
    """A family whose inputs are sequences of token ids of any length up to a maximum. It is served in length buckets."""

    @property
    def max_length(self) -> int:
        """The largest number of tokens of an input."""
        ...

    @property
    def token_types(self) -> int:
        """Number of token types. With 1, an input holds token ids alone."""
        ...

    def input_spec(self, batch: int, *, length: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape and dtype of inputs of `length` tokens; `max_length` tokens if left out."""
        ...

    def pack(self, ids: Any, types: Any = None, *, mask: Any = None, length: int | None = None) -> np.ndarray:
        """Padded inputs from token ids (B, T), token types (B, T) and a mask (B, T)."""
        ...
