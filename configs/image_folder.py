"""A folder of your own images: a template for image classifiers that train on a CPU.

    superserve train image_folder --data.path ~/pets --workdir runs/pets

Images: PATH/train/CLASS/*.jpg, and if you have them PATH/val/CLASS and PATH/test/CLASS; or only PATH/CLASS/*.jpg.
Network: basic blocks of 16, 32 and 64 channels, as in digits_resnet.py. The number of classes, the image size, mean and
standard deviation come from the data. Training reports them in its first line.
What to change first: `--epochs` (more for fewer images), `--data.image-size 96`, `--data.channels 1` for grey images,
`--data.no-flip` if left and right matter, as in digits or signs.
"""

from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import OptimConfig, SearchConfig, TrainConfig
from superserve_jax.training.data import FolderConfig
from superserve_jax.training.template import from_data


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="image_folder",
        model=from_data(
            OFAResNetConfig(
                block="basic",
                stem_width=16,
                stem_stride=2,
                stem_pool=False,
                stage_widths=(16, 32, 64),
                strides=(1, 2, 2),
                depths=((0, 1, 2), (1, 2, 3), (1, 2, 3, 4)),
                expand_ratios=(0.5, 0.75, 1.0),
                width_mults=(0.5, 0.75, 1.0),
                divisor=8,
            ),
            "num_classes",
            "image_size",
            "channels",
            "mean",
            "std",
        ),
        data=FolderConfig(image_size=64, channels=3, shift=4, flip=True),
        optim=OptimConfig(name="adamw", lr=4e-3, schedule="cosine"),
        epochs=20,
        batch_size=64,
        calibration_examples=2048,
        search=SearchConfig(candidates=80, served=24),
    )
