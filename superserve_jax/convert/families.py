"""Weights of others for a SuperNet whose config is known beforehand, by the config's family."""

from typing import Any

from superserve_jax import errors
from superserve_jax.convert import hugging_face, once_for_all, state_dict
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet

_FILL = {OFAResNetConfig.family: once_for_all.fill, DynaBERTConfig.family: hugging_face.fill}


def weights(state: Any, config: FamilyConfig) -> SuperNet:
    """The SuperNet of `config` with the weights of a state dict of once-for-all's or Hugging Face's.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      config: of a family for which others have published weights, an `OFAResNetConfig` or a `DynaBERTConfig`.

    Raises:
      ConversionError: weights are missing, surplus or misshapen; all are listed. ConfigError: theirs is no such network.
      UnknownNameError: nobody's weights are known for this family.
    """
    if config.family not in _FILL:
        raise errors.unknown_name("family with weights of others", config.family, _FILL)
    return _FILL[config.family](config, state_dict.read(state))
