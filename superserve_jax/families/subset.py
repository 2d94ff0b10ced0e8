"""One subnet of a family as a network of its own: what sharing weights is compared with."""

import dataclasses
from typing import Any, ClassVar

from superserve_jax import errors
from superserve_jax.subnet import SearchSpace, Subnet


@dataclasses.dataclass(frozen=True)
class SingleSubnetConfig:
    """A family whose space holds one subnet only. Whatever is not defined here is the family's.

    Parameters keep the SuperNet's shapes and first values, and the program slices the subnet's out of them; the others get
    no gradient.

    Args:
      model: the family's config.
      subnet: one of `model.space()`.

    >>> from superserve_jax.families.ofa_resnet import OFAResNetConfig
    >>> whole = OFAResNetConfig()
    >>> alone = SingleSubnetConfig(whole, whole.space().smallest())
    >>> alone.space().size, alone.flops(alone.space().largest()) == whole.flops(whole.space().smallest())
    (1, True)
    """

    family: ClassVar[str] = "single_subnet"

    model: Any
    subnet: Subnet

    @errors.refusing(errors.ConfigError, "SingleSubnetConfig: model is a family's config, subnet one of its space")
    def __post_init__(self):
        if not hasattr(self.model, "family"):
            raise errors.ConfigError(f"model must be a family's config such as OFAResNetConfig, got {self.model!r}")
        object.__setattr__(self, "subnet", self.model.space().validate(self.subnet))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("model", "subnet"):  # not there yet, while an instance is copied
            raise AttributeError(name)
        return getattr(self.model, name)

    def space(self) -> SearchSpace:
        """The space of nothing elastic, whose one subnet `Subnet(())` stands for `subnet`."""
        return SearchSpace(())

    def sizes(self, _: Subnet) -> dict[str, int]:
        """Those of `subnet`."""
        return self.model.sizes(self.subnet)

    def flops(self, _: Subnet) -> int:
        """Those of `subnet`."""
        return self.model.flops(self.subnet)

    def num_params(self, _: Subnet) -> int:
        """Those of `subnet`."""
        return self.model.num_params(self.subnet)
