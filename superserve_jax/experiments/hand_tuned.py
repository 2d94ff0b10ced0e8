"""Published ResNets for ImageNet, to compare a SuperNet with networks designed by hand (the paper's Figure 5a). No jax.

Our notes on the paper say "four hand-made ResNets" and do not name them. We take the four smallest of torchvision. Top-1
accuracies, parameters and multiply-adds are those of its documentation (weights IMAGENET1K_V1, images of 224 x 224):
https://pytorch.org/vision/stable/models/resnet.html
"""

from typing import NamedTuple


class ResNet(NamedTuple):
    """A published network: top-1 accuracy in percent, parameters, and multiply-adds of one image in units of 1e9."""

    name: str
    accuracy: float
    params: int
    gflops: float

    @property
    def weights_bytes(self) -> int:
        """Bytes of the parameters in float32, without statistics."""
        return 4 * self.params


RESNETS = (
    ResNet("ResNet-18", 69.758, 11_689_512, 1.81),
    ResNet("ResNet-34", 73.314, 21_797_672, 3.66),
    ResNet("ResNet-50", 76.130, 25_557_032, 4.09),
    ResNet("ResNet-101", 77.374, 44_549_160, 7.80),
)
