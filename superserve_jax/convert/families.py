"""Builds the SuperNet of a given config with the weights of another project."""

from typing import Any

from superserve_jax import errors
from superserve_jax.convert import hugging_face, once_for_all, state_dict
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet

_FILL = {OFAResNetConfig.family: once_for_all.fill, DynaBERTConfig.family: hugging_face.fill}


def weights(state: Any, config: FamilyConfig) -> SuperNet:
    """The SuperNet of `config` with the weights of a state dict from once-for-all or Hugging Face.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      config: an `OFAResNetConfig` or a `DynaBERTConfig`.

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message lists all of them.
      ConfigError: the other project has no network with this config.
      UnknownNameError: weights of other projects cannot be converted to this family.
    """
    if config.family not in _FILL:
        raise errors.unknown_name("family with weights of other projects", config.family, _FILL)
    return _FILL[config.family](config, state_dict.read(state))
