"""A tiny network on cluttered digits, to try the programs. It learns little: expect an accuracy near chance, 10 %.

It takes about a minute from training to export on 2 cores without a GPU.

    superserve train debug
"""

from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import DataConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="debug",
        model=OFAResNetConfig(
            num_classes=10,
            image_size=32,
            channels=1,
            block="basic",
            stem_width=8,
            stem_stride=4,
            stem_pool=False,
            stem_depths=(1,),
            stage_widths=(16,),
            strides=(2,),
            depths=((1, 2),),
            expand_ratios=(0.5, 1.0),
            width_mults=(0.5, 1.0),
            divisor=4,
            mean=(0.15,),
            std=(0.25,),
        ),
        data=DataConfig(name="cluttered_digits", image_size=32, channels=1, shift=2, cache=True),
        epochs=0.1,
        buckets=2,
        calibration_examples=256,
        search=SearchConfig(candidates=6, calibration_examples=128, examples=250, served=3),
        checkpoint_every=10,
        log_every=5,
    )
