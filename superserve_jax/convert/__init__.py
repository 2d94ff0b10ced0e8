"""SuperNets from published weights of other projects: once-for-all's OFA-ResNet50 and Hugging Face's BERT.

    from superserve_jax import convert

    model = convert.ofa_resnet("ofa_resnet50.pth", depth_list=[0, 1, 2], expand_ratio_list=[0.2, 0.25, 0.35],
                               width_mult_list=[0.65, 0.8, 1.0], image_size=224)
    model = convert.bert("model.safetensors", num_heads=12)
    model = convert.weights("ofa_resnet50.pth", config)    # for a known config

A state dict is a mapping of arrays, or the path of a .npz, .safetensors, .pth, .pt or .bin file.
"""

from superserve_jax.convert.families import weights
from superserve_jax.convert.hugging_face import bert
from superserve_jax.convert.once_for_all import ofa_arch, ofa_resnet, ofa_subnet

__all__ = ["bert", "ofa_arch", "ofa_resnet", "ofa_subnet", "weights"]
