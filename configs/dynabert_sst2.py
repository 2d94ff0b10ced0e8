"""The published DynaBERT on BERT-base, for SST-2 (Hou et al., NeurIPS 2020): single sentences, positive or negative.

Texts: GLUE's SST-2 (`glue/sst2`, which TFDS prepares), sentences of up to 64 tokens, and the vocab.txt of BERT-base uncased.
Network and recipe: as in dynabert_mnli.py, from a BERT that was fine-tuned on the task.
Expected: BERT-base itself reaches 93.5 % on GLUE's test set (Devlin et al., NAACL 2019). The labels of that set are not
public, so the test split here is the development set. Not run here, because it takes GPUs. Convert your fine-tuned weights,
then train them further:

    superserve convert dynabert_sst2 model.safetensors
    superserve train dynabert_sst2
"""

from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training.config import DistillConfig, OptimConfig, Phase, SearchConfig, TrainConfig
from superserve_jax.training.data import TextConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="dynabert_sst2",
        model=DynaBERTConfig(num_classes=2, max_length=64),
        data=TextConfig("glue/sst2", validation=2000, max_length=64, token_types=2, vocabulary="vocab.txt"),
        optim=OptimConfig(name="adamw", lr=2e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
        phases=(Phase(elastic=("heads", "ffn"), rewire=True), Phase()),
        distill=DistillConfig(hidden=0.1),
        epochs=6,
        batch_size=32,
        random_subnets=2,
        search=SearchConfig(candidates=300, examples=2000, served=24),
    )
