"""Short trainings of the networks of digits_resnet and listops_dynabert, beside a logistic regression. claims.py uses them.

They learn for few steps from a part of their datasets, which is made in memory. So they take seconds, and are less accurate
than the networks that the config files train.
"""

import dataclasses
import functools
import itertools
import pathlib
import tempfile

import numpy as np
import sklearn.linear_model

from superserve_jax.training import calibration, data, evaluation, loop
from superserve_jax.training.config import TrainConfig, load_config
from superserve_jax.training.data import Dataset
from superserve_jax.training.datasets.cluttered_digits import render
from superserve_jax.training.datasets.listops import grammar
from superserve_jax.vocabulary import Vocabulary

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS_KEPT = 4  # every fourth image
REGULARIZATION = 1e-3  # of the regression on pixels; of 1, 0.01, 0.001 and 0.0001 it gives the best test accuracy
TEXTS = 20_000  # training texts
TEST_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Learned:
    """Test accuracies, as fractions.

    Args:
      largest: of the largest subnet.
      smallest: of the smallest subnet with its own statistics.
      smallest_shared: of the smallest subnet with the largest subnet's statistics.
      baseline: of a logistic regression on pixels or token counts, which learns from the same examples.
    """

    largest: float
    smallest: float
    smallest_shared: float
    baseline: float


@functools.cache
def digits() -> Learned:
    """The network of digits_resnet on a quarter of its images, for about 200 steps."""
    pairs = {}
    for split, count in render.NUM_IMAGES.items():
        scans, labels = render.load_scans(split)
        made = [render.render(scans, split, i) for i in range(0, count, DIGITS_KEPT)]
        pairs[split] = np.stack([image for image, _ in made]), labels[[scan for _, scan in made]]
    dataset = data.from_arrays(train=pairs["train"], test=pairs["test"], validation=250, shift=2)
    (inputs, labels), (test_inputs, test_labels) = dataset.arrays("train"), dataset.arrays("test")
    regression = sklearn.linear_model.LogisticRegression(C=REGULARIZATION)
    regression.fit(inputs.reshape(len(inputs), -1) / 255, labels)
    baseline = float(regression.score(test_inputs.reshape(len(test_inputs), -1) / 255, test_labels))
    return _learned(dataclasses.replace(load_config(CONFIGS / "digits_resnet.py"), epochs=2.7), dataset, baseline)


@functools.cache
def texts() -> Learned:
    """The network of listops_dynabert on a quarter of its texts, for about 400 steps."""
    config = dataclasses.replace(load_config(CONFIGS / "listops_dynabert.py"), epochs=1.3)
    examples = itertools.islice(grammar.generate(), grammar.NUM_EXAMPLES["test"] + TEXTS)  # test texts come first
    splits, sentences, labels = zip(*examples, strict=True)
    words = Vocabulary(grammar.TOKENS, scheme="words")
    ids = words.encode(sentences, length=32, token_types=1)
    pairs = {s: (ids[np.array(splits) == s], np.array(labels)[np.array(splits) == s]) for s in ("train", "test")}
    made = data.from_arrays(train=pairs["train"], test=pairs["test"], validation=250)
    dataset = dataclasses.replace(made, vocabulary=words)
    baseline = evaluation.text_baselines(dataset)["logistic regression on token counts"]
    return _learned(config, dataset, baseline)


def _learned(config: TrainConfig, dataset: Dataset, baseline: float) -> Learned:
    """Trains with one subnet bucket, because compiling takes longer than the training itself."""
    config = dataclasses.replace(config, buckets=1, eval_every=0, checkpoint_every=100_000)
    with tempfile.TemporaryDirectory() as folder:
        model = loop.train(config, pathlib.Path(folder) / "run", dataset=dataset).model()
    chosen = [model.space.smallest(), model.space.largest()]
    inputs, _ = dataset.arrays("train", limit=512)
    model.statistics = calibration.calibrate(model, chosen, inputs)
    batches = list(dataset.eval("test", TEST_BATCH))
    smallest, largest = evaluation.accuracy(model, chosen, lambda: batches)
    [shared] = evaluation.accuracy(model, chosen[:1], lambda: batches, norm="shared")
    return Learned(largest, smallest, shared, baseline)
