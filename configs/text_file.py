"""Your own texts with labels: a template for text classifiers that train on a CPU.

    superserve train text_file --data.path reviews.csv --data.text review --data.label sentiment

Texts: a CSV, TSV or JSON-lines file, or a folder with train.csv, val.csv and test.csv. The columns are found by their names.
Network: as in listops_dynabert.py. The number of classes and the vocabulary come from the data. The vocabulary is the most
frequent words of the training texts, or `--data.vocabulary vocab.txt`. Splitting texts into words needs
`pip install 'superserve-jax[text]'`.
What to change first: `--epochs` (more for fewer texts), `--data.max-length 128` for longer texts.
"""

from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training.config import OptimConfig, Phase, SearchConfig, TrainConfig
from superserve_jax.training.data import TextFileConfig
from superserve_jax.training.template import from_data


def get_config() -> TrainConfig:
    """The experiment."""
    return TrainConfig(
        name="text_file",
        model=from_data(
            DynaBERTConfig(hidden_size=64, depths=(1, 2, 3, 4), heads=(1, 2, 4), ffn=(64, 128, 256)),
            "num_classes",
            "vocab_size",
            "pad_id",
            "max_length",
            "token_types",
        ),
        data=TextFileConfig(max_length=64),
        optim=OptimConfig(name="adamw", lr=1.5e-3, schedule="cosine", clip_norm=1.0),
        phases=(Phase(share=0.5, elastic=()), Phase(share=0.5)),
        epochs=10,
        batch_size=64,
        buckets=4,
        search=SearchConfig(candidates=40, served=12),
    )
