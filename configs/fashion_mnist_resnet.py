"""A small OFA-ResNet on Fashion-MNIST: a SuperNet on a standard dataset that trains on two CPU cores.

Images: 28x28 grey, ten kinds of clothes (dataset `fashion_mnist`; the first command downloads it, or takes files of yours).
The last 5,000 training images are held out: subnets are chosen on them. The test images are read once, at the end.
Network: basic blocks of 32, 64 and 128 channels; depth {1, 2} in each stage, width and inner width {0.5, 0.75, 1}.
Expected: test accuracy 93.6 % (smallest) to 94.9 % (largest subnet), mean of 3 seeds; 70 to 90 minutes on two CPU cores.

    superserve prepare fashion_mnist
    superserve train fashion_mnist_resnet
    superserve standalone runs/fashion_mnist_resnet
"""

from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import OptimConfig, SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="fashion_mnist_resnet",
        model=OFAResNetConfig(
            num_classes=10,
            image_size=28,
            channels=1,
            block="basic",
            stem_width=16,
            stem_stride=1,
            stem_pool=False,
            stage_widths=(32, 64, 128),
            strides=(2, 2, 2),
            depths=((1, 2), (1, 2), (1, 2)),
            expand_ratios=(0.5, 0.75, 1.0),
            width_mults=(0.5, 0.75, 1.0),
            divisor=8,
            mean=(0.286,),
            std=(0.353,),
        ),
        data=DataConfig(name="fashion_mnist", validation=5000, image_size=28, channels=1, shift=2, flip=True, cache=True),
        optim=OptimConfig(name="adamw", lr=4e-3, schedule="cosine", weight_decay=0.05),
        epochs=30,
        batch_size=128,
        label_smoothing=0.1,
        calibration_examples=4096,
        search=SearchConfig(candidates=120, calibration_examples=1024, examples=5000, served=24, tolerance=0.004),
    )
