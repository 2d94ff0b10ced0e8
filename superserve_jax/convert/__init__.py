"""SuperNets from published weights of other projects: once-for-all, Hugging Face transformers, and timm.

    from superserve_jax import convert

    model = convert.ofa_resnet("ofa_resnet50.pth", depth_list=[0, 1, 2], expand_ratio_list=[0.2, 0.25, 0.35],
                               width_mult_list=[0.65, 0.8, 1.0], image_size=224)
    model = convert.ofa_mobilenet("ofa_mbv3_w1.0.pth", ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4],
                                  width_mult=1.0, image_size=224)
    model = convert.bert("model.safetensors", num_heads=12)
    model = convert.vit("model.safetensors", num_heads=12, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))    # ViT, DeiT, DINOv2
    found = convert.from_pretrained("my-classifier")    # a directory of save_pretrained: found.model, found.class_names
    model = convert.weights("ofa_resnet50.pth", config)    # for a known config

A state dict is a mapping of arrays, or the path of a .npz, .safetensors, .pth, .pt or .bin file.
"""

from typing import Any

from superserve_jax import errors
from superserve_jax.convert import hugging_face, once_for_all, once_for_all_mobilenet, state_dict, vision_transformer
from superserve_jax.convert.hugging_face import bert
from superserve_jax.convert.once_for_all import ofa_arch, ofa_resnet, ofa_subnet
from superserve_jax.convert.once_for_all_mobilenet import ofa_mobilenet, ofa_mobilenet_subnet
from superserve_jax.convert.pretrained import Pretrained, from_pretrained
from superserve_jax.convert.vision_transformer import vit
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_mobilenet import OFAMobileNetConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.families.vit import ViTConfig
from superserve_jax.supernets.family import FamilyConfig
from superserve_jax.supernets.supernet import SuperNet

__all__ = [
    "Pretrained",
    "bert",
    "from_pretrained",
    "ofa_arch",
    "ofa_mobilenet",
    "ofa_mobilenet_subnet",
    "ofa_resnet",
    "ofa_subnet",
    "vit",
    "weights",
]

_FILL = {
    OFAResNetConfig.family: once_for_all.fill,
    OFAMobileNetConfig.family: once_for_all_mobilenet.fill,
    DynaBERTConfig.family: hugging_face.fill,
    ViTConfig.family: vision_transformer.fill,
}


def weights(state: Any, config: FamilyConfig) -> SuperNet:
    """The SuperNet of `config` with the weights of a state dict from once-for-all, Hugging Face or timm.

    Args:
      state: a mapping of arrays, or a file, see `state_dict.read`.
      config: an `OFAResNetConfig`, an `OFAMobileNetConfig`, a `DynaBERTConfig` or a `ViTConfig`.

    Raises:
      ConversionError: weights are missing, surplus, not finite or of another shape. The message names them.
      ConfigError: the other project has no network with this config.
      UnknownNameError: weights of other projects cannot be converted to this family.
    """
    errors.check_name("family with weights of other projects", config.family, _FILL)
    return _FILL[config.family](config, state_dict.read(state))
