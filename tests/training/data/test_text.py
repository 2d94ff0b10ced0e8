"""Texts of GLUE through a tiny vocabulary: mocks of glue/mnli and glue/sst2.

The mocks are the real TFDS builders, with the features they have upstream, that yield a few sentences instead of downloads.
"""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from small_datasets import prepare_mock, sizes
from tensorflow_datasets.text import glue

from superserve_jax import errors
from superserve_jax.training import data, evaluation
from superserve_jax.training.data import DataConfig, TextConfig
from superserve_jax.vocabulary import Vocabulary

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "good", "bad", "film", "not", "##s", "."]
WORDS = ["the", "cat", "sat", "good", "bad", "film", "not", "cats", "films."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A TFDS folder with mocks of glue/mnli and glue/sst2; splits named test have no labels, as in the original."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    few = {"train": 40, "validation_matched": 7, "validation_mismatched": 9, "test_matched": 3, "test_mismatched": 3}
    for name, keys, count in (
        ("mnli", ("premise", "hypothesis"), few),
        ("sst2", ("sentence",), {"train": 40, "validation": 8, "test": 5}),
    ):

        def make(split, i, rng, keys=keys):
            texts = {key: " ".join(rng.choice(WORDS, rng.integers(2, 9))) for key in keys}
            return {**texts, "label": -1 if split.startswith("test") else i % 2, "idx": i}

        prepare_mock(folder, glue.Glue, count, make, config=name)
    return folder


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n")
    return str(path)


@pytest.fixture
def open_glue(folder, vocab_file):
    """Opens a task of GLUE with changes to its config."""
    return lambda task, **changes: data.open(TextConfig(f"glue/{task}", folder, vocabulary=vocab_file, **changes))


def test_mnli_gives_pairs_with_token_types_and_validation_matched_as_test(open_glue):
    dataset = open_glue("mnli", validation=5, max_length=12, token_types=2)
    assert sizes(dataset) == [35, 5, 7]
    assert dataset.class_names == ("entailment", "neutral", "contradiction")
    inputs = next(dataset.train(4, seed=0))["inputs"]
    assert (inputs.shape, inputs.dtype) == ((4, 12, 2), np.int32)
    for ids, kinds in zip(inputs[..., 0], inputs[..., 1], strict=True):
        tokens = [TOKENS[i] for i in ids if i]
        assert tokens[0] == "[CLS]"
        assert tokens[-1] == "[SEP]"
        assert tokens.count("[SEP]") == 2
        second = tokens.index("[SEP]") + 1
        assert kinds.tolist() == [0] * second + [1] * (len(tokens) - second) + [0] * (12 - len(tokens))


def test_the_premise_of_mnli_comes_first(open_glue, folder):
    dataset = open_glue("mnli", validation=5, max_length=30, token_types=2)
    record = tfds.builder("glue/mnli", data_dir=folder).as_data_source("validation_matched")[0]
    both = [[record[key].decode()] for key in ("premise", "hypothesis")]
    expected = dataset.vocabulary.encode(*both, length=30, token_types=2)
    assert np.array_equal(dataset.arrays("test")[0][:1], expected)


def test_sst2_gives_single_sentences_and_its_validation_split_as_test(open_glue):
    dataset = open_glue("sst2", validation=4, max_length=10)
    assert sizes(dataset) == [36, 4, 8]
    assert (dataset.arrays("test")[1] >= 0).all()
    batches = list(dataset.eval("test", 5))
    assert [b["inputs"].shape for b in batches] == [(5, 10)] * 2
    assert sum(b["weight"].sum() for b in batches) == 8
    assert TOKENS[batches[0]["inputs"][0, 0]] == "[CLS]"


@pytest.mark.parametrize(("lowercase", "first"), [(True, "the"), (False, "[UNK]")])
def test_a_cased_vocabulary_gives_other_ids(open_glue, lowercase, first):
    [ids] = open_glue("sst2", validation=4, lowercase=lowercase).vocabulary.encode(["The film"], length=4)
    assert [TOKENS[i] for i in ids] == ["[CLS]", first, "film", "[SEP]"]


def test_baselines_count_tokens_and_not_their_order():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 9, (400, 6)).astype(np.int32)
    more, first = (ids == 5).sum(1) > (ids == 6).sum(1), ids[:, 0] < 6
    words = Vocabulary(tuple(TOKENS))

    def baselines(labels):
        pair = ids, labels.astype(np.int32)
        dataset = data.from_arrays(train=pair, test=pair, validation=10)
        dataset.vocabulary = words
        return evaluation.text_baselines(dataset)

    assert baselines(more)["logistic regression on token counts"] > 0.95
    assert baselines(first)["logistic regression on token counts"] < 0.85
    assert baselines(more)["majority class"] == max(np.mean(more), 1 - np.mean(more))


def test_a_dataset_of_another_kind_is_a_data_error(digits_dir, folder, vocab_file):
    with pytest.raises(errors.DataError, match=r"holds \['image', 'label'\].*premise\+hypothesis"):
        data.open(TextConfig("cluttered_digits", digits_dir, vocabulary=vocab_file))
    with pytest.raises(errors.DataError, match=r"holds \['idx', 'label', 'sentence'\]; choose one with an Image"):
        data.open(DataConfig("glue/sst2", folder))
