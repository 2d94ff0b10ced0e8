"""The published DynaBERT on BERT-base, for MNLI (Hou et al., NeurIPS 2020; SuperServe's transformer).

Texts: GLUE's MNLI (`glue/mnli`, which TFDS prepares), pairs of up to 128 tokens, and the vocab.txt of BERT-base uncased.
Network: 110 M parameters; depth {6, 9, 12}, heads {3, 6, 9, 12} and neurons {768, 1536, 2304, 3072} of each layer.
Recipe: as published. It begins with a BERT that was fine-tuned on the task and sorts heads and neurons by importance. Then it
trains 3 epochs with elastic width and 3 with elastic width and depth, at learning rate 2e-5 and batch size 32. Logits and
hidden states follow a teacher. There are two differences: here the teacher is the largest subnet itself (--distill.teacher
sets another one), and texts are not augmented.
Expected: 82.2 to 85.2 % on the matched development set, from SuperServe's paper. Not run here, because it takes GPUs. Convert
your fine-tuned weights, then train them further:

    superserve convert dynabert_mnli model.safetensors
    superserve train dynabert_mnli
"""

from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training.config import DistillConfig, OptimConfig, Phase, SearchConfig, TrainConfig
from superserve_jax.training.data import TextConfig


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="dynabert_mnli",
        model=DynaBERTConfig(num_classes=3, max_length=128),
        data=TextConfig("glue/mnli", validation=10_000, max_length=128, token_types=2, vocabulary="vocab.txt"),
        optim=OptimConfig(name="adamw", lr=2e-5, schedule="cosine", warmup=0.1, weight_decay=0.01, clip_norm=1.0),
        phases=(Phase(elastic=("heads", "ffn"), rewire=True), Phase()),
        distill=DistillConfig(hidden=0.1),
        epochs=6,
        batch_size=32,
        random_subnets=2,
        search=SearchConfig(candidates=300, examples=10_000, served=24),
    )
