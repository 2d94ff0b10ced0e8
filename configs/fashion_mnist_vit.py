"""A small ViT on Fashion-MNIST: a transformer SuperNet on a standard dataset that trains on two CPU cores.

Images: 28x28 grey, ten kinds of clothes (dataset `fashion_mnist`; the first command downloads it, or takes files of yours).
The last 5,000 training images are held out: subnets are chosen on them. The test images are read once, at the end.
Network: 49 patches of 4x4 pixels, width 64, 6 blocks; depth 3 to 6, quarters of 4 heads and of 256 neurons.
Expected: test accuracy 83.1 % (smallest) to 88.0 % (largest subnet), mean of 3 seeds; 65 minutes on one CPU core.

    superserve prepare fashion_mnist
    superserve train fashion_mnist_vit
"""

from superserve_jax.families.vit import ViTConfig
from superserve_jax.training.config import OptimConfig, Phase, SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="fashion_mnist_vit",
        model=ViTConfig(
            num_classes=10,
            image_size=28,
            channels=1,
            patch=4,
            widths=(64,),
            depths=(3, 4, 5, 6),
            heads=(1, 2, 3, 4),
            mlp=(64, 128, 192, 256),
            tokens=0,
            pool="mean",
            mean=(0.286,),
            std=(0.353,),
        ),
        data=DataConfig(name="fashion_mnist", validation=5000, image_size=28, channels=1, shift=2, flip=True, cache=True),
        optim=OptimConfig(name="adamw", lr=1e-3, schedule="cosine", warmup=0.1, weight_decay=0.05, clip_norm=1.0),
        phases=(Phase(share=0.3, elastic=()), Phase(share=0.7, rewire=True)),
        epochs=12,
        batch_size=128,
        label_smoothing=0.1,
        search=SearchConfig(candidates=120, examples=5000, served=24, tolerance=0.004),
    )
