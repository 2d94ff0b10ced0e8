"""The published OFA-ResNet50 on ImageNet, for the weights of once-for-all (Cai et al., ICLR 2020; SuperServe's CNN).

Images: ImageNet at 224x224 (`imagenet2012`, which TFDS prepares from the archives that you downloaded).
Network: 48 M parameters; depth {0, 1, 2} blocks above the smallest, expand ratio {0.2, 0.25, 0.35}, width {0.65, 0.8, 1}.
Expected: 73 to 80 % top-1, from SuperServe's paper. Training it takes many GPUs. Convert the published weights instead, then
search, calibrate, evaluate and export:

    superserve convert ofa_resnet50 ofa_resnet50.pth
    superserve search runs/ofa_resnet50
    superserve calibrate runs/ofa_resnet50
    superserve evaluate runs/ofa_resnet50
    superserve export runs/ofa_resnet50
"""

from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import OptimConfig, SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="ofa_resnet50",
        model=OFAResNetConfig(),
        data=DataConfig(
            name="imagenet2012", validation=10_000, image_size=224, channels=3, flip=True, random_crop=True, cache=False
        ),
        optim=OptimConfig(name="sgd", lr=0.03, weight_decay=3e-5, schedule="cosine"),
        epochs=25,
        batch_size=256,
        random_subnets=2,
        label_smoothing=0.1,
        calibration_examples=4096,
        search=SearchConfig(candidates=500, calibration_examples=2048, examples=10_000, served=30),
    )
