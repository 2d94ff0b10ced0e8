"""A family of only one subnet, to train this subnet alone: the baseline that weight sharing is compared with."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from superserve_jax import errors
from superserve_jax.space import SearchSpace
from superserve_jax.subnet import Subnet
from superserve_jax.supernets.family import FamilyConfig, Fold, FoldableConfig, SequenceConfig, TracedConfig


@dataclasses.dataclass(frozen=True)
class SingleSubnetConfig:
    """A family with only one subnet, `Subnet(())`. It computes the same as the subnet `subnet` of the family `model`.

    Parameters keep the SuperNet's shapes and initial values. The program slices the subnet's weights out of them. All other
    weights get no gradient. If `model` is a `SequenceConfig`, the instance belongs to a subclass, as with `pathlib.Path`.

    Args:
      model: the config of the whole family.
      subnet: a subnet of `model.space()`.

    >>> from superserve_jax.families.ofa_resnet import OFAResNetConfig
    >>> whole = OFAResNetConfig()
    >>> single = SingleSubnetConfig(whole, whole.space().smallest())
    >>> single.space().size, single.flops(single.space().largest()) == whole.flops(whole.space().smallest())
    (1, True)
    """

    family: ClassVar[str] = "single_subnet"

    model: FamilyConfig
    subnet: Subnet

    def __new__(cls, model: Any = None, subnet: Any = None):
        """An instance of the subclass for sequences if the inputs of `model` are sequences."""
        return object.__new__(_SingleSequenceConfig if isinstance(model, SequenceConfig) else cls)

    def __post_init__(self):
        if not isinstance(self.model, FamilyConfig):
            raise errors.ConfigError(f"model must be a family's config such as OFAResNetConfig, got {self.model!r}")
        object.__setattr__(self, "subnet", self.model.space().validate(self.subnet))

    @property
    def num_classes(self) -> int:
        """Size of the logits."""
        return self.model.num_classes

    def create(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network of the whole family, freshly initialised."""
        return self.model.create(rngs)

    def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of inputs."""
        return self.model.input_spec(batch)

    def space(self) -> SearchSpace:
        """The search space without any choice."""
        return SearchSpace(())

    def sizes(self, _: Subnet) -> dict[str, int]:
        """The sizes of `subnet`."""
        return self.model.sizes(self.subnet)

    def norm_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """Channels of each norm."""
        return self.model.norm_sizes(sizes)

    def folds(self) -> list[Fold]:
        """The norms of the whole family that can be folded. None of a traced family, whose channels need not be the first."""
        if isinstance(self.model, TracedConfig) or not isinstance(self.model, FoldableConfig):
            return []
        return self.model.folds()

    def flops(self, _: Subnet) -> int:
        """Multiply-adds of `subnet`."""
        return self.model.flops(self.subnet)

    def num_params(self, _: Subnet) -> int:
        """Number of weights of `subnet`."""
        return self.model.num_params(self.subnet)


class _SingleSequenceConfig(SingleSubnetConfig):
    """A `SingleSubnetConfig` of a family whose inputs are sequences of token ids."""

    model: SequenceConfig

    vocab_size = property(lambda self: self.model.vocab_size)
    max_length = property(lambda self: self.model.max_length)
    token_types = property(lambda self: self.model.token_types)
    pad_id = property(lambda self: self.model.pad_id)

    def input_spec(self, batch: int, *, length: int | None = None) -> jax.ShapeDtypeStruct:
        return self.model.input_spec(batch, length=length)

    def pack(self, ids: Any, types: Any = None, *, mask: Any = None, length: int | None = None) -> np.ndarray:
        return self.model.pack(ids, types, mask=mask, length=length)
