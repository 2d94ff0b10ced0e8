"""Makes ofa_resnet_small.npz and .json: a small network of once-for-all with random weights, and the logits it computes.

It needs PyTorch (2.13 was used) and the repository mit-han-lab/once-for-all at f03b267, neither of which the tests need:

    git clone https://github.com/mit-han-lab/once-for-all && git -C once-for-all checkout f03b267
    PYTHONPATH=once-for-all python tests/data/make_ofa_resnet_small.py
"""

import json
import pathlib
import random

import numpy as np
import torch
from ofa.imagenet_classification.elastic_nn.networks.ofa_resnets import OFAResNets

SIZES = {
    "n_classes": 10,
    "depth_list": [0, 1, 2],
    "expand_ratio_list": [0.2, 0.25, 0.35],
    "width_mult_list": [0.03, 0.06, 0.09],
}
IMAGE_SIZE = 64
PATH = pathlib.Path(__file__).with_name("ofa_resnet_small")


def make_random(network: torch.nn.Module) -> None:
    """Gives every weight and statistic a random value with which activations neither vanish nor explode."""
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.dim() == 1 and name.endswith("weight"):  # the scale of a norm
            value.normal_(0.3 if "conv3" in name else 1.0, 0.1)  # small where a block's residual is added
        elif value.dim() <= 1 and value.is_floating_point():
            value.normal_(0.0, 0.3)
        elif value.is_floating_point():
            value.normal_(0.0, (2 / value[0].numel()) ** 0.5)


def subnets() -> list[dict[str, list]]:
    """The largest subnet, the smallest, and three random ones, in the form that `set_active_subnet` takes."""
    depths, ratios, widths = 5, 18, 6
    choices = random.Random(0)
    ends = [{"d": [d] * depths, "e": [e] * ratios, "w": [w] * widths} for d, e, w in ((2, 0.35, 2), (0, 0.2, 0))]
    return ends + [
        {
            "d": [choices.choice([0, 2]), *choices.choices(SIZES["depth_list"], k=depths - 1)],
            "e": choices.choices(SIZES["expand_ratio_list"], k=ratios),
            "w": choices.choices(range(3), k=widths),
        }
        for _ in range(3)
    ]


def main() -> None:
    """Writes both files."""
    torch.manual_seed(0)
    network = OFAResNets(**SIZES)
    make_random(network)
    network.eval()
    x, chosen, logits = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), subnets(), []
    with torch.no_grad():
        for subnet in chosen:
            network.set_active_subnet(**subnet)
            logits.append(network(x).numpy())
    state = {f"state/{name}": value.numpy() for name, value in network.state_dict().items()}
    np.savez_compressed(PATH.with_suffix(".npz"), x=x.numpy(), logits=np.stack(logits), **state)
    source = "mit-han-lab/once-for-all f03b267, OFAResNets with random weights; logits computed by it in float32 on the CPU"
    about = {**SIZES, "image_size": IMAGE_SIZE, "subnets": chosen, "source": source}
    PATH.with_suffix(".json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
