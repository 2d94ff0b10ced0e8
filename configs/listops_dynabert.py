"""A small DynaBERT on ListOps: a transformer SuperNet that trains in minutes on two CPU cores.

Texts: nested operations on digits of up to 31 tokens, "[MAX 2 9 [MIN 4 7 ] 0 ]" (dataset `listops`, made on this machine).
Network: 64 channels; 1 to 4 layers, each with {1, 2, 4} heads and {64, 128, 256} neurons. The first half of the steps trains
only the largest subnet, since DynaBERT also begins with a BERT that was trained for its task. It learns much faster that way
than if all subnets are trained from the first step on.
Expected on test texts, means of three seeds: largest subnet 57.1 % (standard deviation 0.9), smallest 35.5 % (1.6). A logistic
regression on token counts reaches 29.0 %, the most frequent value 10.5 %. Training takes about 8 minutes on 2 cores without
a GPU. The third command prints the means.

    superserve train listops_dynabert
    superserve evaluate runs/listops_dynabert
    python train/bench/seeds.py configs/listops_dynabert.py --seeds 0 1 2
"""

from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training.config import OptimConfig, Phase, SearchConfig, TrainConfig
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
        optim=OptimConfig(name="adamw", lr=1.5e-3, schedule="cosine", clip_norm=1.0),
        phases=(Phase(share=0.5, elastic=()), Phase(share=0.5)),
        epochs=5,
        batch_size=64,
        buckets=4,
        search=SearchConfig(candidates=40, served=12),
    )
