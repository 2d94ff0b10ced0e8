"""Makes ofa_mobilenet_small.npz and .json: a small OFA-MobileNetV3 with random weights, and the logits it computes.

It needs PyTorch (2.13 was used) and once-for-all's package (0.1.0.post202307202001), neither of which the tests need:

    pip install torch ofa torchvision
    python tests/data/make_ofa_mobilenet_small.py
"""

import json
import pathlib
import random

import numpy as np
import torch
from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

SIZES = {
    "n_classes": 10,
    "ks_list": [3, 5, 7],
    "expand_ratio_list": [3, 4, 6],
    "depth_list": [2, 3],
    "width_mult": 0.1,
}
IMAGE_SIZE = 64
PATH = pathlib.Path(__file__).with_name("ofa_mobilenet_small")


def make_random(network: torch.nn.Module) -> None:
    """Gives every weight and statistic a random value with which activations neither vanish nor explode.

    The values fit float16, so that they take less space in the file.
    """
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif name.endswith("_matrix"):  # near the identity, but different from it
            value.copy_(torch.eye(len(value)) + 0.1 * torch.randn_like(value))
        elif value.dim() == 1 and name.endswith("weight"):  # the scale of a norm
            value.normal_(0.5 if "point_linear" in name else 1.0, 0.1)  # small where a block's residual is added
        elif value.dim() <= 1 and value.is_floating_point():
            value.normal_(0.0, 0.3)
        elif value.is_floating_point():
            value.normal_(0.0, (2 / value[0].numel()) ** 0.5)
        if value.is_floating_point():
            value.copy_(value.half().float())


def subnets() -> list[dict[str, list]]:
    """The largest subnet, the smallest, and three random ones, in the form that `set_active_subnet` takes."""
    stages, blocks = 5, 15
    choices = random.Random(0)
    ends = [{"ks": [k] * blocks, "e": [e] * blocks, "d": [d] * stages} for k, e, d in ((7, 6, 3), (3, 3, 2))]
    return ends + [
        {
            "ks": choices.choices(SIZES["ks_list"], k=blocks),
            "e": choices.choices(SIZES["expand_ratio_list"], k=blocks),
            "d": choices.choices(SIZES["depth_list"], k=stages),
        }
        for _ in range(3)
    ]


def main() -> None:
    """Writes both files."""
    torch.manual_seed(0)
    network = OFAMobileNetV3(dropout_rate=0, **SIZES)
    make_random(network)
    network.eval()
    x, chosen, logits = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), subnets(), []
    x = x.half().float()
    with torch.no_grad():
        for subnet in chosen:
            network.set_active_subnet(**subnet)
            logits.append(network(x).numpy())
    state = {f"state/{name}": value.numpy() for name, value in network.state_dict().items()}
    np.savez_compressed(PATH.with_suffix(".npz"), x=x.numpy(), logits=np.stack(logits), **state)
    source = "ofa 0.1.0.post202307202001, OFAMobileNetV3 with random weights; logits computed by it in float32 on the CPU"
    about = {**SIZES, "image_size": IMAGE_SIZE, "subnets": chosen, "source": source}
    PATH.with_suffix(".json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
