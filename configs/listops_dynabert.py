"""A small DynaBERT on ListOps: a transformer SuperNet that trains in minutes on two CPU cores.

python train/supernet.py configs/listops_dynabert.py
"""

from superserve_jax.supernets.dynabert import DynaBERTConfig
from superserve_jax.training.config import OptimConfig, SearchConfig, TrainConfig
from superserve_jax.training.data import TextConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="listops_dynabert",
        model=DynaBERTConfig(
            num_classes=10,
            vocab_size=17,
            max_length=32,
            token_types=1,
            hidden_size=64,
            depths=(1, 2, 3, 4),
            heads=(1, 2, 4),
            ffn=(64, 128, 256),
        ),
        data=TextConfig("listops", max_length=32),
        optim=OptimConfig(name="adamw", lr=2e-3, schedule="cosine", warmup=0.1, clip_norm=1.0),
        epochs=3,
        batch_size=64,
        search=SearchConfig(candidates=40, served=12),
    )
